import pytest
import torch

from ffnprobe import memories
from ffnprobe.analyzers.memories import Memories, Row, word
from ffnprobe.models import ffns, output_gain, plain, tokenizer_of
from ffnprobe.stream import capture
from ffnprobe.unembedding import unembedding
from ffnprobe.vocabulary import read_values


def strongest(model, tokens, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    seen = [batch[layer] for batch in capture(model, tokens, ["post"], layers=[layer])]
    hidden = torch.cat([a.sites["post"][a.kept] for a in seen])
    return hidden, torch.cat([a.at[a.kept] for a in seen])


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_triggers_are_the_strongest_ordinary_tokens(architecture, model_of, tokens):
    model = model_of(architecture)
    text = tokens(model)
    result = memories(model, text, layers=[1], triggers=3)
    hidden, at = strongest(model, text, 1)
    ranked = hidden.abs() if ffns(model)[1].gated else hidden
    for row in result.rows:
        best = ranked[:, row.neuron].topk(3).indices
        size = ranked[best, row.neuron] * ffns(model)[1].values[row.neuron].norm()
        assert [t["contribution"] for t in row.triggers] == pytest.approx(size.tolist(), rel=1e-5)
        assert [t["at"] for t in row.triggers] == at[best].tolist()
        assert not text.special.flatten()[at[best]].any()


def test_values_are_read_through_the_folded_unembedding(gpt2, tokens):
    layer = ffns(gpt2)[2]
    raised, lowered = read_values(layer.values, unembedding(gpt2), 4)
    scores = layer.values @ unembedding(gpt2).T
    assert torch.equal(raised, scores.argsort(dim=1, descending=True, stable=True)[:, :4])
    assert torch.equal(lowered, scores.argsort(dim=1, stable=True)[:, :4])


def test_values_that_write_the_next_token_agree_and_shuffled_ones_do_not(planted, model_of, tokens):
    before = model_of("opt")
    text = tokens(before)
    layer = 2  # the last: what it writes changes no trigger
    follow = [t.triggers[0]["at"] + 1 for t in memories(before, text, layers=[layer]).rows]

    def plant(hf):
        # through the final norm, a value points at one token of the unembedding
        rows = unembedding(before)
        ids = text.ids.flatten()[torch.tensor(follow).clamp(max=text.n - 1)]
        values = rows[ids] / rows[ids].norm(dim=1, keepdim=True)
        hf.model.decoder.layers[layer].fc2.weight.copy_(values.T)

    result = memories(planted("opt", plant), text, layers=[layer])
    there = [row for row in result.rows if row.next_token]
    read = read_values(ffns(planted("opt", plant))[layer].values, unembedding(before), 1)[0]
    ids = text.ids.flatten()[torch.tensor(follow).clamp(max=text.n - 1)]
    legible = {i for i in range(len(ids)) if read[i, 0] == ids[i]}
    assert len(there) > 20 and len(legible) > 15
    assert all(row.agrees == (row.neuron in legible) for row in there)
    summary = result.layers()[0]
    assert summary.above_shuffled and summary.agreement > 5 * summary.shuffled


def test_shuffled_agreement_is_the_mean_over_random_pairings(gpt2, tokens):
    text = tokens(gpt2)
    result = memories(gpt2, text, layers=[0])
    top = [row.promotes[0] for row in result.rows]
    following = [row.next_token for row in result.rows]
    generator = torch.Generator().manual_seed(0)
    rates = [
        sum(
            top[j] == following[i] and following[i] != ""
            for i, j in enumerate(torch.randperm(len(top), generator=generator))
        )
        / len(top)
        for _ in range(2000)
    ]
    assert result.layers()[0].shuffled == pytest.approx(sum(rates) / len(rates), abs=5e-3)


def test_a_gated_neuron_with_key_and_value_negated_reads_the_same(planted, model_of, tokens):
    def negate(hf):
        mlp = hf.model.layers[1].mlp
        mlp.up_proj.weight[::2] *= -3
        mlp.down_proj.weight[:, ::2] /= -3

    one, other = model_of("llama"), planted("llama", negate)
    text = tokens(one)
    for a, b in zip(memories(one, text, layers=[1]).rows, memories(other, text, layers=[1]).rows, strict=True):
        assert (a.promotes, a.suppresses, a.agrees, a.next_token) == (
            b.promotes,
            b.suppresses,
            b.agrees,
            b.next_token,
        )
        assert [t["at"] for t in a.triggers] == [t["at"] for t in b.triggers]
        assert a.firing_rate == b.firing_rate
        assert a.key_value_cosine == pytest.approx(b.key_value_cosine, abs=1e-5)
        assert a.contribution == pytest.approx(b.contribution, rel=1e-4)


def test_a_key_with_a_bias_far_below_zero_never_fires(planted, model_of, tokens):
    def silence(hf):
        hf.model.decoder.layers[1].fc1.bias[5] = -1e4

    def silent(model) -> set[int]:
        return {row.neuron for row in memories(model, tokens(model), layers=[1]).rows if row.firing_rate == 0}

    assert silent(planted("opt", silence)) - silent(model_of("opt")) == {5}


def test_the_table_round_trips(gpt2, tokens, tmp_path):
    result = memories(gpt2, tokens(gpt2), layers=[0])
    again = Memories.load(result.save(tmp_path / "t.parquet"))
    assert list(again.rows) == list(result.rows)
    assert again.findings() == result.findings()


def layer_rows(layer: int, agree: int, n: int = 200) -> list[Row]:
    """A layer in which `agree` of n neurons agree, where chance would give one."""
    numbers = {
        name: 1.0 if "float" in kind else [] if "list" in kind else 1 for name, kind in Row.__annotations__.items()
    }
    numbers |= {"layer": layer, "next_token": "a", "agrees_shuffled": 1 / n}
    return [Row(**{**numbers, "neuron": i, "agrees": i < agree}) for i in range(n)]


@pytest.mark.parametrize(
    ("layers", "verdict"), [(0, "not supported"), (2, "not supported"), (7, "mixed"), (20, "mixed")]
)
def test_the_verdict_follows_its_rule(layers, verdict):
    rows = [row for layer in range(20) for row in layer_rows(layer, agree=20 if layer < layers else 1)]
    assert [v.verdict for v in Memories(rows, {}).verdicts()] == [verdict]
    assert Memories(rows[:600], {}).verdicts() == []  # of three layers nothing is said


def test_shuffled_sd_is_that_of_random_pairings():
    summary = Memories(layer_rows(0, 2), {}).layers()[0]
    assert summary.agreement == pytest.approx(2 / 200)
    assert summary.shuffled == pytest.approx(1 / 200)
    assert summary.shuffled_sd == pytest.approx((1 / 200 * 199 / 200 / 200) ** 0.5)
    assert not summary.above_shuffled  # 2 is within 2 sd of 1


def test_chance_is_a_random_ordinary_token_and_positions_are_within_documents(model_of, tokens):
    model, text = model_of("llama"), tokens(model_of("llama"))
    result = memories(model, text, layers=[1])
    ordinary = text.ids[~text.special].tolist()
    words = [word(tokenizer_of(model), i) for i in range(300)]
    seen = [words[i] for i in ordinary]
    chance = sum(seen.count(row.promotes[0]) for row in result.rows) / len(seen) / len(result.rows)
    assert all(row.agrees_chance == pytest.approx(chance) for row in result.rows)
    assert all(row.position == row.triggers[0]["at"] % 16 for row in result.rows)
    gates, values = ffns(model)[1].gates, ffns(model)[1].values
    cosine = torch.nn.functional.cosine_similarity(gates, values, dim=1).abs()
    assert [row.gate_value_cosine for row in result.rows] == pytest.approx(cosine.tolist(), abs=1e-6)
    everywhere = result.by_position((4,))
    assert [name for name, *_ in everywhere] == ["0-3", "4+"]
    early = [row.agrees for row in result.rows if row.position < 4]
    assert everywhere[0][1] == pytest.approx(sum(early) / len(early))


def test_what_follows_the_last_token_of_a_document_is_nothing(gpt2, tokens):
    text = tokens(gpt2, document=2)  # a separator and one token: nothing follows any trigger
    result = memories(gpt2, text, layers=[0])
    assert {row.next_token for row in result.rows} == {""}
    assert not any(row.agrees or row.agrees_shuffled for row in result.rows)


def test_raised_and_lowered_words_are_those_of_the_written_direction(gpt2, tokens):
    result = memories(gpt2, tokens(gpt2), layers=[2], readings=3)
    words = [word(tokenizer_of(gpt2), i) for i in range(300)]
    hidden, _ = strongest(gpt2, tokens(gpt2), 2)
    for row in result.rows:
        sign = 1.0 if hidden[:, row.neuron].max() >= 0 else -1.0
        scores = unembedding(gpt2) @ ffns(gpt2)[2].values[row.neuron] * sign
        assert row.promotes == [words[i] for i in scores.topk(3).indices]
        assert row.suppresses == [words[i] for i in (-scores).topk(3).indices]


def test_values_behind_a_norm_are_read_with_its_gain(model_of, tokens):
    model = model_of("gemma2")
    gain = 1 + plain(model).model.layers[2].post_feedforward_layernorm.weight
    assert torch.allclose(output_gain(model, 2), gain, rtol=1e-4)
    row = memories(model, tokens(model), layers=[2]).rows[5]
    sign = (
        1.0
        if strongest(model, tokens(model), 2)[0][:, 5].abs().max() in strongest(model, tokens(model), 2)[0][:, 5]
        else -1.0
    )
    scores = unembedding(model) @ (ffns(model)[2].values[5] * gain) * sign
    assert row.promotes[0] == word(tokenizer_of(model), int(scores.argmax()))
