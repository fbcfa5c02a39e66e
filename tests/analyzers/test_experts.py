from dataclasses import replace

import pytest
import torch

from ffnprobe import capture, experts, ffns
from ffnprobe.analyzers.experts import Experts
from ffnprobe.analyzers.kept_experts import CLUSTERS, NEURONS, ORACLE, RANDOM, ROUTER, every_other
from ffnprobe.analyzers.partition import Partition, partitions
from ffnprobe.corpus import Tokens
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.ffn import FFN


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ffn(d: int = 5, d_mlp: int = 24, gated: bool = False) -> FFN:
    part = [gaussian(d_mlp, d, seed=seed) for seed in (1, 2, 3)]
    bias = gaussian(d_mlp, seed=4)
    act = "silu" if gated else "gelu"
    return FFN(0, part[0], part[1], act, part[2] if gated else None, bias, bias if gated else None, gaussian(d))


@pytest.fixture(scope="module")
def measured(gpt2):
    """Of the tiny GPT-2, 12 experts of 3 neurons; the means are those of half of the documents."""
    return experts(gpt2, text(gpt2), clusters=12, draws=1)


def text(model, sequences: int = 4):
    ids = torch.randint(1, 290, (sequences, 64), generator=torch.Generator().manual_seed(0))
    ids[:, ::16] = 0
    return Tokens(ids, torch.arange(sequences * 64).view(-1, 64) // 16, ids == 0, {})


def test_all_experts_are_the_layer_and_lose_exactly_nothing(measured):
    whole = [row for row in measured.rows if row.share == 1]
    assert {(row.partition, row.choice) for row in whole} == {
        (CLUSTERS, ORACLE),
        (CLUSTERS, ROUTER),
        (RANDOM, ORACLE),
        (RANDOM, ROUTER),
        (NEURONS, ORACLE),
    }
    for row in whole:
        assert row.kept == 1
        if row.layer is None:
            assert row.delta_loss == 0 and row.delta_loss_se == 0 and row.gap_kept == 1
        else:
            assert row.r2 == 1


def test_more_experts_keep_more_and_the_oracle_more_than_the_router(measured):
    for partition in (CLUSTERS, RANDOM, NEURONS):
        kept = list(measured.curve(partition, ORACLE, "r2").values())
        assert kept == sorted(kept)
    for share in (0.1, 0.2, 0.3, 0.5):
        assert (
            measured.curve(NEURONS, ORACLE, "r2")[share]
            > measured.curve(CLUSTERS, ORACLE, "r2")[share]
            > measured.curve(CLUSTERS, ROUTER, "r2")[share]
        )


def planted_ffn(groups: int = 6, each: int = 4, d: int = 12) -> FFN:
    """Groups of neurons whose keys are the same direction, and who write in one."""
    directions = torch.linalg.qr(gaussian(d, d)).Q.T[:groups]
    keys = directions.repeat_interleave(each, 0)
    values = torch.linalg.qr(gaussian(d, d, seed=1)).Q.T[:groups].repeat_interleave(each, 0)
    order = torch.randperm(groups * each, generator=torch.Generator().manual_seed(2))
    bias = torch.full((groups * each,), -0.5)
    return FFN(0, keys[order], values[order], "relu", key_bias=bias)


def test_of_a_planted_layer_one_cluster_of_six_is_all_and_a_random_part_is_not():
    ffn, which = planted_ffn(), torch.arange(60) % 6
    x = torch.linalg.qr(gaussian(12, 12)).Q.T[:6][which]
    h, pre = ffn.hidden(x), ffn.pre(x)
    mean = torch.zeros(24)
    cut = partitions(ffn, mean, 6, 3, seed=0)
    assert sorted(cut) == [("clusters", 0), ("neurons", 0), ("random", 0), ("random", 1), ("random", 2)]
    for choice in (ORACLE, ROUTER):
        kept = cut["clusters", 0].chosen(h, pre, choice, 1)
        assert torch.equal(torch.where(kept, h, mean), h) and kept.sum(1).eq(4).all()
        for draw in range(3):
            kept = cut["random", draw].chosen(h, pre, choice, 1)
            assert kept.sum(1).eq(4).all()
            assert float(torch.where(kept, h, mean).norm() / h.norm()) < 0.9
    assert torch.equal(cut["neurons", 0].chosen(h, pre, ORACLE, 4), h > 0)


@pytest.mark.parametrize("gated", [False, True])
def test_scores_are_the_slow_loop(gated):
    ffn, x = random_ffn(gated=gated), gaussian(7, 5, seed=9)
    h, pre, mean = ffn.hidden(x), ffn.pre(x), gaussian(24, seed=5)
    part = Partition(torch.arange(24) * 5 % 24 % 7, ffn.values, mean)
    lost, match = part.lost(h), part.match(pre)
    reading, bias = (ffn.gates, ffn.gate_bias) if gated else (ffn.keys, ffn.key_bias)
    for expert in range(7):
        neurons = (part.labels == expert).nonzero().squeeze(1)
        gone = h.clone()
        gone[:, neurons] = mean[neurons]
        assert torch.allclose(lost[:, expert], (ffn.write(h) - ffn.write(gone)).square().sum(1), rtol=1e-4)
        centre = x @ reading[neurons].mean(0) + bias[neurons].mean()
        assert torch.allclose(match[:, expert], centre, atol=1e-5)
    for choice, score in ((ORACLE, lost), (ROUTER, match)):
        kept = part.chosen(h, pre, choice, 2)
        for token in range(7):
            best = score[token].argsort(descending=True)[:2].tolist()
            assert kept[token].tolist() == [int(label) in best for label in part.labels]


def test_single_neurons_are_scored_as_parts_of_one():
    ffn, x = random_ffn(), gaussian(7, 5, seed=9)
    mean, labels = gaussian(24, seed=5), torch.randperm(24, generator=torch.Generator().manual_seed(3))
    found = Partition(labels, ffn.values, mean).lost(ffn.hidden(x))
    expected = (ffn.hidden(x) - mean).square() * ffn.values.square().sum(1)
    assert torch.allclose(found[:, labels], expected, rtol=1e-5)


def test_planted_groups_are_the_clusters_whatever_their_order():
    ffn = planted_ffn()
    labels = partitions(ffn, torch.zeros(24), 6, 0, 0)["clusters", 0].labels
    together = (ffn.keys @ ffn.keys.T) > 0.5
    assert torch.equal(labels[:, None] == labels, together)


def test_the_table_is_what_capture_and_a_loop_give(gpt2, measured):
    tokens, layer = text(gpt2), 1
    (batch,) = capture(gpt2, tokens, ("in", "post", "out"), layers=[layer], batch=8)
    act, ffn = batch[layer], ffns(gpt2)[layer]
    odd = tokens.document.flatten()[act.at] % 2 == 1
    mean = act.sites["post"][act.kept & ~odd].mean(0)
    x, h, y = (act.sites[site][act.kept & odd] for site in ("in", "post", "out"))
    part = partitions(ffn, mean, 12, 1, 0)["clusters", 0]
    for choice in (ORACLE, ROUTER):
        kept = part.chosen(h, ffn.pre(x), choice, 3)  # 12 x 0.2, rounded up
        written = ffn.write(torch.where(kept, h, mean))
        r2 = 1 - float((y - written).square().sum() / (y - y.mean(0)).square().sum())
        (row,) = (
            r
            for r in measured.rows
            if (r.layer, r.choice, r.share) == (layer, choice, 0.2) and r.partition == CLUSTERS
        )
        assert row.r2 == pytest.approx(r2, abs=1e-4)
        assert row.kept == pytest.approx(9 / 36) and row.documents == 8 and row.experts == 12


def test_the_loss_gap_is_that_of_layers_at_their_mean(measured):
    together = [row for row in measured.rows if row.layer is None]
    assert len(together) == 5 * 7 and measured.settings["ablated"] != 0
    for row in together:
        assert row.gap_kept == pytest.approx(1 - row.delta_loss / measured.settings["ablated"])
        assert row.documents == 8


def test_the_documents_of_the_means_are_not_those_of_the_loss(gpt2):
    tokens = text(gpt2)
    other = every_other(tokens, 100)
    assert other.ids.shape == (1, 64)
    assert other.document.unique().tolist() == [1, 3, 5, 7]
    same = tokens.document.flatten() == 3
    assert torch.equal(other.ids[other.document == 3], tokens.ids.flatten()[same])
    assert torch.equal(other.special, other.ids == 0)


def test_a_gated_layer_is_the_same_under_another_gauge():
    ffn, x = random_ffn(gated=True), gaussian(30, 5, seed=8)
    a = 2.0 ** torch.randint(-3, 4, (24,), generator=torch.Generator().manual_seed(1)) * (-1) ** torch.arange(24)
    other = replace(ffn, keys=ffn.keys * a[:, None], values=ffn.values / a[:, None], key_bias=ffn.key_bias * a)
    found = []
    for layer in (ffn, other):
        h, pre = layer.hidden(x), layer.pre(x)
        cut = partitions(layer, h.mean(0), 6, 1, 0)
        for part in cut.values():
            for choice in (ORACLE, ROUTER):
                kept = part.chosen(h, pre, choice, 2)
                found.append(layer.write(torch.where(kept, h, part.mean)))
    half = len(found) // 2
    for one, two in zip(found[:half], found[half:], strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_the_verdict_wants_few_clusters_that_beat_random_parts(measured):
    def judged(routed: float, clusters: float, random: float, layers: int = 6) -> list:
        rows = []
        for row in measured.rows:
            if row.layer is None:
                kept = 0.99 if row.share >= routed else 0.5
                rows.append(replace(row, gap_kept=kept if row.partition == CLUSTERS else 0.99))
            elif row.layer == 0:
                told = clusters if row.partition == CLUSTERS else random
                told = 1.0 if row.share == 1 else told
                rows += [replace(row, layer=layer, r2=told) for layer in range(layers)]
        return Experts(rows, measured.settings).verdicts()

    assert judged(0.3, 0.8, 0.7)[0].verdict == "supported"
    assert judged(0.5, 0.8, 0.7)[0].verdict == judged(0.3, 0.7, 0.8)[0].verdict == "mixed"
    assert judged(0.5, 0.7, 0.8)[0].verdict == "not supported"
    assert judged(0.3, 0.8, 0.7, layers=4) == []


def test_the_smallest_share_is_read_off_the_curve(measured):
    rows = [
        replace(row, r2={0.5: 0.96, 0.75: 0.97, 1.0: 1.0}.get(row.share, 0.9))
        for row in measured.rows
        if row.layer == 0
    ]
    assert Experts(rows, measured.settings).fewest(CLUSTERS, ORACLE, "r2") == 0.5


def test_the_table_travels(measured, tmp_path):
    again = Experts.load(measured.save(tmp_path / "table.parquet"))
    assert again.findings() == measured.findings() and again.rows == tuple(measured.rows)


def test_what_is_refused(gpt2, model_of):
    with pytest.raises(InputError, match="clusters=0"):
        experts(gpt2, text(gpt2), clusters=0)
    with pytest.raises(ModelRefused, match="predicts no next token"):
        experts(model_of("bert"), text(gpt2))
