"""What a token reads of a layer's memories, and whose token wins."""

from dataclasses import replace

import pytest
import torch
import zoo

from ffnprobe import memory_use
from ffnprobe.analyzers.memory_use import ALL, CASES, MemoryUse, Row
from ffnprobe.analyzers.token_reads import Reads, in_use
from ffnprobe.errors import InputError
from ffnprobe.intervene import block_outputs
from ffnprobe.models import contribution, ffns, plain, taps
from ffnprobe.stream import capture
from ffnprobe.taps import flat
from ffnprobe.unembedding import unembedding


def reads_of(model, hidden, layer: int = 2) -> dict[str, torch.Tensor]:
    """What is noted of tokens with these hidden activations, in a layer without a bias."""
    ffn = replace(ffns(model)[layer], bias=None)
    reads = Reads(model, ffn, unembedding(model), k=2, seed=0)
    read = {"in": torch.ones(len(hidden), ffn.d_model), "pre": hidden, "post": hidden, "out": ffn.write(hidden)}
    at = torch.arange(len(hidden))
    reads.see(read, at, at)
    return reads.noted


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_of_a_one_hot_memory_one_memory_decides(model_of, architecture):
    model = model_of(architecture)
    hidden = torch.diag(
        torch.tensor([1.5, -2.0] * (ffns(model)[2].d_mlp // 2))
    )  # a negative one writes its negative
    noted = reads_of(model, hidden)
    for name, expected in (("participation_ratio", 1), ("top_share", 1), ("zero_agreement", 0), ("strongest", 1)):
        assert torch.allclose(noted[name], torch.full_like(noted[name], expected)), name
    assert noted["zero_agreement_null"].mean() < 1 and noted["strongest_null"].mean() < 0.5


def test_memories_of_one_size_are_all_in_use(gpt2):
    norms = ffns(gpt2)[2].values.norm(dim=1)
    noted = reads_of(gpt2, (1 / norms).repeat(3, 1))
    assert torch.allclose(noted["participation_ratio"], torch.full((3,), float(len(norms))).double(), rtol=1e-5)
    assert torch.allclose(noted["top_share"], torch.full((3,), 2 / len(norms)).double(), rtol=1e-5)


def test_a_token_that_reads_nothing_is_no_error():
    assert [float(x) for x in in_use(torch.zeros(1, 4), 2)] == [0.0, 0.0]


@pytest.mark.parametrize("architecture", [name for name in zoo.SIZES if name != "bert"])
def test_what_an_ffn_adds_is_what_the_stream_lacks_without_it(model_of, architecture):
    model = model_of(architecture)
    tap, network = taps(model)[1], plain(model).base_model
    ids, written = torch.arange(1, 13)[None], []

    def silence(module, args, output):
        written.append(output)
        return 0 * output

    with torch.no_grad(), block_outputs(model) as outputs:
        network(input_ids=ids, use_cache=False)
    handle = tap.down.register_forward_hook(silence)
    try:
        with torch.no_grad(), block_outputs(model) as without:
            network(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    added = contribution(model, tap.layer)(flat(written[0]))
    assert torch.allclose(flat(outputs[1]) - flat(without[1]), added, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_table_is_a_slow_loop_over_tokens(model_of, tokens, architecture):
    model, text = model_of(architecture), tokens(model_of(architecture), sequences=2)
    layer, words, ffn = 1, unembedding(model), ffns(model)[1]
    (row,) = memory_use(model, text, layers=[layer], sample=10**6, k=3, groups=()).group()
    seen = [batch[layer] for batch in capture(model, text, ["pre", "post", "out"], layers=[layer])]
    zero, strongest, ratio = [], [], []
    for batch in seen:
        for h, y in zip(batch.sites["post"][batch.kept], batch.sites["out"][batch.kept], strict=True):
            top = int((words @ y).argmax())
            memories = [int((words @ (v * h_i.sign())).argmax()) for v, h_i in zip(ffn.values, h, strict=True)]
            a = h.abs() * ffn.values.norm(dim=1)
            zero.append(top not in memories)
            strongest.append(memories[int(a.argmax())] == top)
            ratio.append(float(a.sum() ** 2 / (a**2).sum()))
    assert row.tokens == len(zero)
    assert row.zero_agreement == pytest.approx(sum(zero) / len(zero))
    assert row.strongest == pytest.approx(sum(strongest) / len(strongest))
    assert row.participation_ratio == pytest.approx(sum(ratio) / len(ratio), rel=1e-5)


def test_the_stream_is_read_before_and_behind_the_ffn(gpt2, tokens):
    text = tokens(gpt2, sequences=2)
    (row,) = memory_use(gpt2, text, layers=[1], sample=10**6, groups=()).group()
    words, read = unembedding(gpt2), {}
    with block_outputs(gpt2) as outputs, torch.no_grad():
        handle = taps(gpt2)[1].down.register_forward_hook(lambda _, args, output: read.update(y=flat(output)))
        plain(gpt2).base_model(input_ids=text.ids)
        handle.remove()
    after, kept = flat(outputs[1]), ~text.special.flatten()
    tops = [(words @ x.T).argmax(0)[kept] for x in (after - read["y"], read["y"], after)]
    before, added, now = tops
    expected = {
        "residual": (now == before) & (now != added),
        "ffn": (now == added) & (now != before),
        "both": (now == added) & (now == before),
        "neither": (now != added) & (now != before),
    }
    for case, share in expected.items():
        assert getattr(row, case) == pytest.approx(float(share.double().mean())), case


def test_positions_are_grouped_within_the_document(gpt2, tokens):
    rows = memory_use(gpt2, tokens(gpt2, sequences=2), layers=[0], sample=10**6, groups=(4, 12)).rows
    assert [(row.positions, row.tokens) for row in rows] == [(ALL, 120), ("0-3", 24), ("4-11", 64), ("12+", 32)]
    for row in rows:
        assert sum(getattr(row, case) for case in CASES) == pytest.approx(1)
        assert sum(getattr(row, f"{case}_null") for case in CASES) == pytest.approx(1)


def test_a_sample_is_drawn_and_the_seed_draws_it(gpt2, tokens):
    text = tokens(gpt2)
    one, same, other = (memory_use(gpt2, text, layers=[0], sample=64, seed=seed) for seed in (0, 0, 1))
    assert one.rows == same.rows != other.rows
    assert one.group()[0].tokens == 64


def test_text_of_special_tokens_only_is_refused(gpt2, tokens):
    text = tokens(gpt2)
    text.special[:] = True
    with pytest.raises(InputError, match="got 0 ordinary tokens"):
        memory_use(gpt2, text)


def layer(number: int, **columns: float) -> Row:
    numbers = {name: 0.3 for name in Row.__annotations__}
    return Row(**(numbers | {"layer": number, "positions": ALL, "tokens": 9, "memories": 9} | columns))


@pytest.mark.parametrize(
    ("strongest", "null", "verdict"), [(0.6, 0.1, "supported"), (0.2, 0.1, "mixed"), (0.1, 0.1, "not supported")]
)
def test_the_verdict_follows_its_rule(strongest, null, verdict):
    rows = [layer(i, strongest=strongest, strongest_null=null) for i in range(8)]
    assert [found.verdict for found in MemoryUse(rows, {}).verdicts()] == [verdict]
    assert MemoryUse(rows[:4], {}).verdicts() == []


def test_the_table_round_trips(gpt2, tokens, tmp_path):
    result = memory_use(gpt2, tokens(gpt2), layers=[0])
    again = MemoryUse.load(result.save(tmp_path / "t.parquet"))
    assert list(again.rows) == list(result.rows) and again.findings() == result.findings()
