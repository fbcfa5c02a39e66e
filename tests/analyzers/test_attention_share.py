"""What attention and FFN add is the stream, and the logits; a silent one does nothing, alone or with the other."""

import math
from dataclasses import replace

import pytest
import torch
import zoo

from ffnprobe import attention_share
from ffnprobe.analyzers.attention_share import AttentionShare, interaction
from ffnprobe.analyzers.sublayers import Targets, adding, look, showing_blocks
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.forward import choose_layers
from ffnprobe.intervene import Losses
from ffnprobe.models import attention_output, plain, taps
from ffnprobe.taps import flat, recording

BRIEF = {"held_out": 128}
LOOKING = {"seed": 0, "batch": 2, "sink_factor": math.inf, "nonfinite": "stop"}
CAUSAL = [name for name in zoo.SIZES if name != "bert"]


def silence(*parts):
    for part in parts:
        part.weight.zero_()
        part.bias.zero_()


@pytest.mark.parametrize("architecture", CAUSAL)
def test_what_enters_a_block_and_what_both_add_is_the_stream_behind_it(model_of, tokens, architecture):
    model, seen = model_of(architecture), []
    ids = tokens(model, sequences=1).ids

    def check(tap, read, written, after):
        added = {name: adds(written[name]) for name, adds in adding(model, tap.layer).items()}
        together = read["residual"] + added["attention"] + added["ffn"]
        assert float((together - after).norm(dim=1).div(after.norm(dim=1)).max()) < 1e-5
        assert all(float(part.norm()) > 0.05 * float(after.norm()) for part in added.values())
        seen.append(tap.layer)

    with showing_blocks(model, choose_layers(model), check), torch.no_grad():
        plain(model)(input_ids=ids)
    assert seen == [0, 1, 2]
    for module in plain(model).modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize(("architecture", "divided"), [("gpt2", 1), ("llama", 1), ("granite", 2), ("olmo2", 1)])
def test_all_that_is_added_to_a_logit_is_the_logit(model_of, tokens, architecture, divided):
    model, text = model_of(architecture), tokens(model_of(architecture), sequences=2)
    found = look(model, text, choose_layers(model), **LOOKING)
    twin = plain(model)
    norm, head = twin.get_submodule(model.ln_final.name), twin.get_output_embeddings()
    with recording({"start": taps(model)[0].block, "norm": norm}) as calls, torch.no_grad():
        logits = twin(input_ids=text.ids).logits.detach().flatten(0, 1) * divided
    start, (x, normed) = calls["start"][0][0], calls["norm"][0]
    bias = getattr(norm, "bias", None)
    offset = torch.zeros_like(x[0]) if bias is None else bias.detach()
    if bias is not None:
        x, start = (rows - rows.mean(1, keepdim=True) for rows in (x, start))
    scale = (norm.weight * x / (normed - offset)).median(dim=1).values.detach()
    rows = head.weight.detach() - head.weight.detach().mean(0)
    at = (~text.special.flatten()).nonzero().squeeze(1)
    predicts = found[0].noted("predicts")
    assert len(predicts) == len(at) and 0 < predicts.sum() < len(at)
    for place, token in enumerate(at.tolist()):
        if not predicts[place]:
            continue
        target = rows[text.ids.flatten()[token + 1]]
        direct = sum(of.noted(f"{name}_logit")[place] for of in found.values() for name in ("attention", "ffn"))
        rest = target @ (norm.weight.detach() * start[token] / scale[token] + offset)
        logit = logits[token, text.ids.flatten()[token + 1]] - logits[token].mean()
        assert float(direct + rest) == pytest.approx(float(logit), abs=2e-4)


def test_norms_and_means_are_over_ordinary_tokens(gpt2, tokens):
    text = tokens(gpt2, sequences=3)
    found = look(gpt2, text, choose_layers(gpt2, [1]), **LOOKING)[1]
    tap = taps(gpt2)[1]
    modules = {"block": tap.block, "attention": attention_output(gpt2, 1), "ffn": tap.down}
    with recording(modules) as calls, torch.no_grad():
        plain(gpt2)(input_ids=text.ids)
    use = ~text.special.flatten()
    before, a, y = calls["block"][0][0][use], calls["attention"][0][1][use], calls["ffn"][0][1][use]
    for name, part in (("attention", a), ("ffn", y)):
        ratio = part.norm(dim=1) / before.norm(dim=1)
        mean, error = found.over_documents(f"{name}_norm")
        assert mean == pytest.approx(float(ratio.mean()), rel=1e-5)
        by_document = ratio.view(12, 15).mean(1)  # all documents are as long
        assert error == pytest.approx(float(by_document.std() / 12**0.5), rel=1e-4)
        assert torch.allclose(found.mean(name).float(), part.mean(0), atol=1e-6)
    share = y.norm(dim=1) / (a.norm(dim=1) + y.norm(dim=1))
    assert found.over_documents("ffn_share")[0] == pytest.approx(float(share.mean()), rel=1e-5)


def test_the_null_is_the_next_tokens_of_other_places(gpt2, tokens):
    text = tokens(gpt2)
    targets = Targets(gpt2, text, seed=0)
    use = targets.predicts
    # the first 15 of each document of 16 have a next one
    assert use.sum() == 32 * 15 and not use[:, 15::16].any()
    following, elsewhere = (targets.ids[name] for name in ("logit", "null"))
    assert torch.equal(following[:, :-1][use[:, :-1]], text.ids[:, 1:][use[:, :-1]])
    assert torch.equal(following[use].sort().values, elsewhere[use].sort().values)
    assert (following[use] == elsewhere[use]).float().mean() < 0.05


@pytest.mark.parametrize(("silent", "other"), [("ffn", "attention"), ("attention", "ffn")])
def test_what_writes_nothing_does_nothing(planted, tokens, silent, other):
    def edit(hf):
        block = hf.transformer.h[1]
        silence(block.mlp.c_proj if silent == "ffn" else block.attn.c_proj)

    model = planted("gpt2", edit)
    (row,) = attention_share(model, tokens(model), layers=[1], **BRIEF).rows
    for name in ("norm", "logit", "null", "delta", "delta_se"):
        assert getattr(row, f"{silent}_{name}") == 0
        assert getattr(row, f"{other}_{name}") != 0
    assert row.both_delta == getattr(row, f"{other}_delta")
    assert row.interaction == pytest.approx(0, abs=1e-12) and row.ffn_share == (silent == "attention")


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_each_gets_the_mean_of_what_it_writes(model_of, tokens, architecture):
    model, text = model_of(architecture), tokens(model_of(architecture))
    (row,) = attention_share(model, text, layers=[1], sink_factor=math.inf, **BRIEF).rows
    rest, test = text.held_out(128)
    modules = {"attention": attention_output(model, 1), "ffn": taps(model)[1].down}
    with recording(modules) as calls, torch.no_grad():
        plain(model)(input_ids=rest.ids)
    use = ~rest.special.flatten()
    means = {name: calls[name][0][1][use].mean(0) for name in modules}

    def loss(*changed):
        def to_mean(name):
            return lambda module, args, output: torch.where(test.special[..., None], output, means[name])

        handles = [modules[name].register_forward_hook(to_mean(name)) for name in changed]
        with torch.no_grad():
            logp = plain(model)(input_ids=test.ids).logits[:, :-1].log_softmax(-1)
        for handle in handles:
            handle.remove()
        picked = logp.gather(2, test.ids[:, 1:, None])[..., 0]
        same = (test.document[:, 1:] == test.document[:, :-1]) & ~test.special[:, 1:]
        return -float(picked[same].mean())

    added = {name: loss(name) - loss() for name in modules} | {"both": loss("attention", "ffn") - loss()}
    for name, delta in added.items():
        assert getattr(row, f"{name}_delta") == pytest.approx(delta, abs=3e-6), name
    together = added["both"] - added["attention"] - added["ffn"]
    assert row.interaction == pytest.approx(together, abs=5e-6) and abs(together) > 1e-4
    assert row.loss == pytest.approx(loss(), rel=1e-5)


def test_the_interaction_is_of_each_document_and_is_above_0_where_one_stands_in_for_the_other():
    changed = {"a": [1.0, 2.0], "b": [1.0, 2.0], "ab": [4.0, 6.0]}
    tensors = {name: torch.tensor(of).double() for name, of in changed.items()}
    found = Losses(torch.tensor([2, 2]), torch.tensor([1.0, 1.5]).double(), tensors)
    mean, error = interaction(found, "ab", ["a", "b"])
    assert mean == ((4 - 1 - 0) + (6 - 1.5 - 1)) / 2  # a and b cost nothing alone in the first document
    assert error == pytest.approx(torch.tensor([3.0, 3.5]).std().item() / 2**0.5)


def test_a_block_that_is_no_sum_is_refused(gpt2, tokens):
    handle = taps(gpt2)[1].block.register_forward_hook(lambda module, args, output: _doubled(output))
    try:
        with pytest.raises(ModelRefused, match="layer 1 is not the sum"):
            look(gpt2, tokens(gpt2, sequences=2), choose_layers(gpt2), **LOOKING)
    finally:
        handle.remove()


def _doubled(output):
    return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * flat(output).view_as(output)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_table_is_whole_and_round_trips(model_of, tokens, architecture, tmp_path):
    model = model_of(architecture)
    result = attention_share(model, tokens(model), layers=[0, 2], **BRIEF)
    again = AttentionShare.load(result.save(tmp_path / "t.parquet"))
    assert again.findings() == result.findings() and [row.layer for row in again.rows] == [0, 2]
    assert all(math.isfinite(value) for row in again.rows for value in vars(row).values())
    assert len(result.plot().axes) == 4


def test_the_verdict_follows_its_rule(gpt2, tokens):
    (row,) = attention_share(gpt2, tokens(gpt2), layers=[1], **BRIEF).rows
    sure = {f"{name}_delta_se": 0.1 for name in ("ffn", "attention")}
    row = replace(row, ffn_delta=1.0, attention_delta=1.0, interaction=0.1, interaction_se=0.1, **sure)

    def verdict(*rows):
        return [v.verdict for v in AttentionShare(rows, {}).verdicts()]

    assert verdict(*[row] * 6) == ["supported"]
    assert verdict(*[replace(row, interaction=-0.5)] * 6) == ["supported"]
    assert verdict(*[replace(row, interaction=0.5)] * 6) == ["mixed"]
    assert verdict(*[replace(row, attention_delta=0.1)] * 6) == ["not supported"]
    assert verdict(*[row] * 4) == []


@pytest.mark.parametrize(
    ("wrong", "said"), [({"layers": [9]}, "layer 9 is not there"), ({"held_out": 512}, "cannot hold 512")]
)
def test_what_is_not_there_is_said(gpt2, tokens, wrong, said):
    with pytest.raises(InputError, match=said):
        attention_share(gpt2, tokens(gpt2), **(BRIEF | wrong))


def test_a_model_that_predicts_no_next_token_is_refused(model_of, tokens):
    with pytest.raises(ModelRefused, match="predicts no next token"):
        attention_share(model_of("bert"), tokens(model_of("bert")))
