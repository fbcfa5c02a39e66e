"""Whatever happens on the way, a run ends with the same bytes."""

import errno
import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from recipes import LENGTH, SHARDS, go, sha256, tokens_of, work_of

import ffnprobe.disk
import ffnprobe.run
import ffnprobe.tensors
from ffnprobe.errors import InputError, MachineError, ModelRefused
from ffnprobe.models import plain
from ffnprobe.run import read_run, run
from ffnprobe.shards import MERGED, Maker
from ffnprobe.statistics import Moments
from ffnprobe.stream import Probe, collect

PLACES = ("within a write", "between write and rename", "between rename and manifest", "within the manifest")


@pytest.fixture(scope="module")
def work(llama):
    return work_of(llama)


@pytest.fixture(scope="module")
def undisturbed(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    go(folder, work)
    return folder


@pytest.fixture
def copy(undisturbed, tmp_path):
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


@pytest.fixture
def computed(monkeypatch):
    """The shards that are computed, in order."""
    numbers: list[int] = []
    made = Maker.__call__

    def make(self, shard):
        numbers.append(shard)
        return made(self, shard)

    monkeypatch.setattr(Maker, "__call__", make)
    return numbers


def test_shards_add_up_to_what_one_pass_collects(work, tmp_path):
    outcome, _ = go(tmp_path, work)
    whole = collect(work.model, work.tokens, work.probes, batch=work.batch)
    assert outcome.bit_equal and outcome.statistics.keys() == whole.keys()
    for name, statistic in whole.items():
        for part, tensor in statistic.tensors().items():
            assert torch.allclose(outcome.statistics[name].tensors()[part], tensor, rtol=1e-12, atol=1e-12)


def test_the_shards_cover_each_sequence_once_in_whole_batches(llama):
    for shard in (1, 3 * LENGTH, 4 * LENGTH, 10**6, None):
        for batch in (1, 2, 3):
            shards = work_of(llama, batch=batch, shard=shard).shards()
            assert torch.cat(shards).tolist() == list(range(7))
            assert all(len(rows) % batch == 0 for rows in shards[:-1])


@pytest.mark.parametrize(("tokens", "shards"), [(5, 1), (8192, 1), (8320, 2), (65536, 8), (1_000_064, 16)])
def test_the_default_shards_are_few_enough_for_the_disk(tokens, shards, llama):
    work = work_of(llama, sequences=-(-tokens // LENGTH), batch=8, shard=None)
    assert len(work.shards()) == shards


@pytest.mark.parametrize(("batch", "shard"), [(1, LENGTH), (3, 3 * LENGTH), (7, 7 * LENGTH)])
def test_the_same_documents_in_any_shape_give_equal_counts_and_sums(batch, shard, llama, undisturbed, tmp_path):
    outcome, _ = go(tmp_path, work_of(llama, batch=batch, shard=shard))
    expected = safetensors.torch.load_file(undisturbed / MERGED)
    for name, statistic in outcome.statistics.items():
        for part, tensor in statistic.tensors().items():
            other = expected[f"{name}:{part}"]
            if tensor.is_floating_point():
                assert (tensor - other).abs().max() <= 1e-6 * other.abs().max()
            elif part == "n":
                assert torch.equal(tensor, other)
    kept, dropped = (outcome.statistics[name].n for name in ("1/top", "1/dropped"))
    assert kept + dropped == 7 * LENGTH  # every token once, and nothing else


@pytest.mark.slow
def test_memory_stays_flat_over_200_batches(llama):
    long = tokens_of(llama, 8 * 220 * 256 // LENGTH)
    tokens = replace(long, **{n: getattr(long, n).view(-1, 256) for n in ("ids", "document", "special")})
    held = []

    def watch(done: int, total: int) -> None:
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    collect(llama, tokens, work_of(llama).probes, progress=watch)
    assert len(held) == 220 and held[-1] - held[19] < 200 * 0.1 * 2**20  # a batch of one site alone is 0.4 MiB


def test_any_reader_of_safetensors_opens_the_sum(undisturbed, work, tmp_path):
    read = safetensors.torch.load_file(undisturbed / MERGED)
    outcome, _ = go(tmp_path, work)
    for name, statistic in outcome.statistics.items():
        for part, tensor in statistic.tensors().items():
            assert torch.equal(read[f"{name}:{part}"], tensor)


def test_the_sum_is_taken_in_ascending_order(work, tmp_path):
    # sums of float32 products are nearly exact in float64; those of float64 products show the order
    probe = Probe(0, "post", Moments.about, of=torch.Tensor.double)
    go(tmp_path, replace(work, probes={"x": probe}))
    parts = [safetensors.torch.load_file(path) for path in sorted((tmp_path / "shards").iterdir())]
    read = safetensors.torch.load_file(tmp_path / MERGED)
    up, down = (sum(part["x:S"] for part in order) for order in (parts, parts[::-1]))
    assert len(parts) == SHARDS
    assert torch.equal(read["x:S"], up) and not torch.equal(up, down)


def test_two_runs_give_the_same_bytes(undisturbed, work, tmp_path):
    go(tmp_path, work)
    assert sha256(tmp_path) == sha256(undisturbed)


def test_a_finished_run_computes_nothing(copy, work, computed):
    seen = []
    outcome, said = go(copy, work, progress=lambda done, total: seen.append(done))
    assert outcome.bit_equal and not computed and not said and not seen


def test_progress_never_falls_and_ends_at_all_tokens(work, tmp_path):
    seen = []
    go(tmp_path, work, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1] == (7 * LENGTH, 7 * LENGTH)


def killed_at(place: str, count: int, folder: Path, work, log: Path) -> bool:
    """Run in a child that SIGKILLs itself the `count`-th time it comes to a place; whether it did."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = count

    def come_to(here: str) -> None:
        nonlocal left
        left -= here == place
        if left == 0 and here == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(name: str, place: str, module) -> None:
        done = getattr(module, name)
        setattr(module, name, lambda *args: (come_to(place), done(*args))[1])

    append, make = ffnprobe.disk.append_line, Maker.__call__

    def torn(path: Path, line: str) -> None:
        if place == PLACES[3] and left == 1:
            path.open("a").write(line[: len(line) // 2])
        come_to(PLACES[3])
        append(path, line)

    def make_and_log(self, shard: int):
        with log.open("a") as file:
            file.write(f"{shard}\n")
        return make(self, shard)

    before("raw_bytes", PLACES[0], ffnprobe.tensors)
    before("_flush_folder", PLACES[2], ffnprobe.disk)  # it comes after the rename
    replaced = Path.replace
    Path.replace = lambda self, to: (come_to(PLACES[1]), replaced(self, to))[1]
    ffnprobe.manifest.append_line = torn
    Maker.__call__ = make_and_log
    try:
        go(folder, work)
    finally:
        os._exit(0)


def survives_kills(seed: int, work, folder: Path, undisturbed: Path) -> None:
    chance, log, kills = random.Random(seed), folder / "computed", 0
    folder.mkdir(exist_ok=True)
    for place in chance.sample(PLACES, 2):
        kills += killed_at(place, chance.randint(1, 20 if place == PLACES[0] else 4), folder, work, log)
    assert kills
    assert not killed_at("nowhere", 1, folder, work, log)
    assert sha256(folder) == sha256(undisturbed)
    assert not list(folder.rglob("*.partial"))
    assert len(log.read_text().split()) <= SHARDS + kills  # at most one shard redone a kill


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_run_ends_with_the_same_bytes(seed, work, undisturbed, tmp_path):
    survives_kills(seed, work, tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 30))
def test_25_more_killed_runs_end_with_the_same_bytes(seed, work, undisturbed, tmp_path):
    survives_kills(seed, work, tmp_path, undisturbed)


def damaged_and_found(copy: Path, work, computed: list[int], damage, count: int) -> None:
    chance = random.Random(0)
    before = sha256(copy)
    for _ in range(count):
        shard = chance.randrange(SHARDS)
        path = copy / "shards" / f"s-{shard:05d}.safetensors"
        data = bytearray(path.read_bytes())
        path.write_bytes(damage(data, chance))
        (copy / MERGED).unlink()
        computed.clear()
        _, said = go(copy, work)
        assert computed == [shard] and sha256(copy) == before
        assert any(path.name in line and "made again" in line for line in said)


def flip(data: bytearray, chance: random.Random) -> bytearray:
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    return data


def test_a_flipped_bit_is_found_named_and_made_again(copy, work, computed):
    damaged_and_found(copy, work, computed, flip, 10)


def test_a_truncated_shard_is_found_and_made_again(copy, work, computed):
    damaged_and_found(copy, work, computed, lambda data, chance: data[: chance.randrange(len(data))], 5)


@pytest.mark.slow
def test_200_flipped_bits_and_50_truncations_are_found(copy, work, computed):
    damaged_and_found(copy, work, computed, flip, 200)
    damaged_and_found(copy, work, computed, lambda data, chance: data[: chance.randrange(len(data))], 50)


def test_a_disk_that_never_keeps_what_is_written_is_given_up(work, tmp_path, monkeypatch):
    made = Maker.__call__

    def make(self, shard):
        entry = made(self, shard)
        path = tmp_path / "shards" / entry.name
        path.write_bytes(flip(bytearray(path.read_bytes()), random.Random(0)))
        return entry

    monkeypatch.setattr(Maker, "__call__", make)
    with pytest.raises(MachineError, match=r"s-00000.safetensors has other bytes .*does the disk fail\?"):
        go(tmp_path, work)


def test_a_flipped_bit_in_the_pilot_is_found(copy, work, computed):
    path = copy / "pilot.safetensors"
    before = path.read_bytes()
    path.write_bytes(flip(bytearray(before), random.Random(1)))
    _, said = go(copy, work)
    assert path.read_bytes() == before and not computed and "pilot.safetensors has other bytes" in said[0]


def take(copy: Path, other: Path, name: str) -> None:
    """Put a file of another run, and its line of the manifest, in the place of this run's."""
    shutil.copy(other / name, copy / name)
    lines = [
        next(line for line in (folder / "MANIFEST.jsonl").read_text().splitlines() if Path(name).name in line)
        for folder in (copy, other)
    ]
    path = copy / "MANIFEST.jsonl"
    path.write_text(path.read_text().replace(*lines))


def test_a_pilot_of_another_plan_is_made_again(copy, undisturbed, work, computed, llama, tmp_path):
    go(tmp_path / "other", work_of(llama, sink_factor=2.0))
    computed.clear()
    take(copy, tmp_path / "other", "pilot.safetensors")
    _, said = go(copy, work)
    assert said == ["pilot.safetensors is of another plan: it is made again"]
    assert not computed and sha256(copy) == sha256(undisturbed)


def test_a_shard_of_another_plan_is_made_again(copy, undisturbed, work, computed, llama, tmp_path):
    other = work_of(llama, batch=1, shard=3 * LENGTH)  # as large on disk, of other sequences
    go(tmp_path / "other", other)
    computed.clear()
    take(copy, tmp_path / "other", "shards/s-00001.safetensors")
    _, said = go(copy, work)
    assert said[0] == "s-00001.safetensors started from another pilot: it is made again"
    assert computed == [1] and sha256(copy) == sha256(undisturbed)


def test_a_torn_or_flipped_manifest_costs_shards_and_no_more(copy, undisturbed, work):
    whole = (undisturbed / "MANIFEST.jsonl").read_bytes()
    chance = random.Random(0)
    torn = [whole[: chance.randrange(len(whole))] for _ in range(10)]
    flipped = [bytes(flip(bytearray(whole), chance)) for _ in range(10)]
    for data in [b"", b"\xff\xfe", b"[]\n1\nnull\n", *torn, *flipped]:
        (copy / "MANIFEST.jsonl").write_bytes(data)
        go(copy, work)
        assert sha256(copy) == sha256(undisturbed)


def test_a_disk_full_at_any_write_stops_cleanly_and_resumes(work, undisturbed, tmp_path, monkeypatch):
    fsync, calls = os.fsync, Counter()

    def full_at(k: int):
        def flush(handle: int) -> None:
            calls[k] += 1
            if calls[k] == k:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        return flush

    monkeypatch.setattr(os, "fsync", full_at(0))
    go(tmp_path / "0", work)
    assert calls[0] > 3 * SHARDS
    for k in range(1, calls[0] + 1):
        monkeypatch.setattr(os, "fsync", full_at(k))
        with pytest.raises(MachineError, match=r"No space left.*[\d,]+ bytes needed, [\d,]+ bytes free"):
            go(tmp_path / str(k), work)
        assert not list(tmp_path.rglob("*.partial"))
        monkeypatch.setattr(os, "fsync", fsync)
        go(tmp_path / str(k), work)
        assert sha256(tmp_path / str(k)) == sha256(undisturbed)


def test_too_small_a_disk_is_said_before_anything_is_computed(work, tmp_path, monkeypatch, computed):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 12345))
    with pytest.raises(MachineError, match=r"4 shards and their sum: [\d,]+ bytes needed, 12,345 bytes free"):
        go(tmp_path, work)
    assert not computed


def test_a_second_run_in_the_folder_is_kept_out(work, tmp_path):
    with (
        run(tmp_path, lambda say: work),
        pytest.raises(InputError, match=rf"in use by process {os.getpid()} on '.+': wait"),
    ):
        go(tmp_path, work)
    go(tmp_path, work)


def test_another_run_is_refused_with_the_difference(copy, work, model_of, llama):
    for changed, said in (
        (replace(work, batch=1), "batch 2, now 1"),
        (replace(work, sink_factor=math.inf), "sink_factor 10.0, now inf"),
        (replace(work, nonfinite="skip"), "nonfinite 'stop', now 'skip'"),
        (work_of(llama, seed=1), "tokens '[0-9a-f]+', now '[0-9a-f]+'"),
        (work_of(llama, sequences=6), "sequences 7, now 6"),
        (work_of(model_of("phi3")), "weights '[0-9a-f]+', now '[0-9a-f]+'"),
        (replace(work, probes=dict(list(work.probes.items())[1:])), "statistics 5, now 4"),
    ):
        with pytest.raises(InputError, match=f"holds another run .*{said}.*choose another folder"):
            go(copy, changed)
    with pytest.raises(InputError, match="seed 0, now 1"):
        settings = read_run(copy) | {"settings": {"seed": 0}}
        (copy / "run.json").write_text(json.dumps(settings))
        go(copy, work, facts={"settings": {"seed": 1}})


def test_one_changed_weight_is_another_model(copy, work):
    weight = next(plain(work.model).parameters())
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1e-6
        with pytest.raises(InputError, match="weights"):
            go(copy, work)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_another_torch_is_said_and_drops_the_mark(work, tmp_path, monkeypatch):
    go(tmp_path, work)
    for path in (tmp_path / "shards").glob("*1.safetensors"):
        path.unlink()
    monkeypatch.setattr(torch, "__version__", "9.9")
    monkeypatch.setattr(ffnprobe.run, "version", lambda name: "9.9" if name == "torch" else "1", raising=True)
    outcome, said = go(tmp_path, work)
    assert not outcome.bit_equal
    assert "now '9.9'" in said[0] and "sums agree to 1e-6" in said[0]


def test_out_of_memory_halves_the_batch_and_drops_the_mark(work, undisturbed, tmp_path, monkeypatch):
    forward = ffnprobe.stream.forward

    def small(model, ids, chosen, on_layer):
        def late(tap, read):
            on_layer(tap, read)
            if len(ids) == 2 and tap.layer == 1:  # the statistics of layer 0 have taken the batch in
                raise torch.OutOfMemoryError("no")

        forward(model, ids, chosen, late)

    monkeypatch.setattr(ffnprobe.stream, "forward", small)
    outcome, said = go(tmp_path, work)
    assert not outcome.bit_equal and any("out of memory" in line for line in said)
    monkeypatch.undo()
    whole, _ = go(undisturbed, work)
    for name, statistic in whole.statistics.items():
        for part, tensor in statistic.tensors().items():
            assert torch.allclose(outcome.statistics[name].tensors()[part], tensor, rtol=1e-5, atol=1e-6)


def test_memory_too_small_for_one_sequence_is_said(work, tmp_path, monkeypatch):
    def never(self, *_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(ffnprobe.stream, "forward", never)
    with pytest.raises(MachineError, match="single sequence"):
        go(tmp_path, work)


@pytest.fixture(params=[math.nan, math.inf, -math.inf])
def poisoned(request, llama):
    """Sequence 3, position 5 of layer 1's hidden activation is not finite; the pilot does not see it."""
    down = plain(llama).base_model.layers[1].mlp.down_proj

    target, rows = work_of(llama).tokens.ids[3], []

    def poison(module, args):
        hidden = args[0].clone()
        hidden[rows, 5, 7] = request.param
        return (hidden,)

    def watch(module, args, kwargs):
        rows[:] = (kwargs["input_ids"] == target).all(dim=1).nonzero().flatten().tolist()

    handles = [
        plain(llama).base_model.register_forward_pre_hook(watch, with_kwargs=True),
        down.register_forward_pre_hook(poison, prepend=True),
    ]
    yield work_of(llama)
    for handle in handles:
        handle.remove()


def test_a_nan_or_inf_stops_with_its_place(poisoned, tmp_path, computed):
    at = 3 * LENGTH + 5
    where = f"layer 1, site post, document {at // 10}, position {at % 10} of it"
    with pytest.raises(ModelRefused, match=where):
        go(tmp_path, poisoned)
    assert computed == [0, 1]  # what came before is kept
    with pytest.raises(ModelRefused, match=where):
        collect(poisoned.model, poisoned.tokens, poisoned.probes)


def test_skipped_tokens_are_counted_and_nothing_else_changes(poisoned, undisturbed, tmp_path):
    outcome, _ = go(tmp_path, replace(poisoned, nonfinite="skip"))
    skipped = [outcome.statistics[f"nonfinite/{layer}"].n for layer in (0, 1)]
    assert skipped == [0, 1]
    assert outcome.statistics["0/post"].n == seen(undisturbed, "0/post")
    assert outcome.statistics["1/top"].n == seen(undisturbed, "1/top") - 1


def seen(folder: Path, name: str) -> int:
    return int(safetensors.torch.load_file(folder / MERGED)[f"{name}:n"])
