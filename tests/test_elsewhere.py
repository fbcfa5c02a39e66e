"""Where the weights lie on other devices, nothing mixes two of them, and every number is the same.

The other devices are the processor's own memory under other names (`elsewhere.py`): what a GPU would refuse is
found without one. How fast a GPU is, and how it rounds, is not.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context

import pandas as pd
import pytest
import torch
import zoo
from accelerate import dispatch_model
from elsewhere import FIRST, SECOND, elsewhere
from test_placement import places
from transformers import AutoModelForCausalLM, AutoTokenizer

import ffnprobe as fp
from ffnprobe import models, statistics, vocabulary
from ffnprobe.executors import Inline
from ffnprobe.models import ffns, load_model
from ffnprobe.report import build
from ffnprobe.report.analyses import ANALYSES
from ffnprobe.report.settings import Settings

pytestmark = pytest.mark.slow

WIDE = {"gpt2": {"n_inner": 300}, "llama": {"intermediate_size": 300}}
KINDS = [
    "CoActivation",
    "FiringRate",
    "Magnitudes",
    "Marginals",
    "Moments",
    "Sample",
    "SketchedMoments",
    "TopActivations",
]
BUDGETS = {"exact": 2**30, "sketched": 800_000}


@contextmanager
def moved(load=None) -> Iterator[torch.device]:
    """Within it, reports load their model elsewhere."""
    with pytest.MonkeyPatch.context() as patch, elsewhere() as device:
        patch.setattr(build, "load_model", load or partial(load_model, device=device))
        yield device


@contextmanager
def alike() -> Iterator[None]:
    """Fused attention and sparse products have no stand-in elsewhere, and are not used here either then."""
    attention = models._attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_attention", lambda hf, kind: attention(hf, "eager"))
        patch.setattr(vocabulary, "_narrow_is_faster", lambda *_: False)
        yield


@pytest.fixture
def there():
    with alike():
        yield moved


def test_another_device_refuses_what_lies_here(there):
    with there() as device:
        here = torch.ones(3)
        moved = here.to(device)
        assert (moved + 1).device == (moved @ moved).device == device and (moved + 1).cpu().tolist() == [2, 2, 2]
        for mixing in (lambda: moved + here, lambda: here @ moved, lambda: torch.cat([here, moved])):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                mixing()
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            moved + moved.to(SECOND)
        moved.to(SECOND).zero_()
        assert moved.cpu().tolist() == here.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_lies_beside_its_rows_and_says_the_same(kind, there):
    rows = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    with there() as device:
        one, other = (_fed(kind, rows.to(where)) for where in ("cpu", device))
        for name, tensor in other.tensors().items():
            assert tensor.device == device or not tensor.ndim
            torch.testing.assert_close(tensor.cpu(), one.tensors()[name])
        back = other.to(torch.device("cpu"))
        assert all(tensor.device.type == "cpu" for tensor in back.tensors().values())
        assert back.to(torch.device("cpu")) is back


def _fed(kind: str, rows: torch.Tensor) -> statistics.Statistic:
    statistic, at = getattr(statistics, kind).about(rows[:60]), torch.arange(len(rows)).to(rows.device)
    for some in (slice(200), slice(200, None)):
        statistic.update(rows[some], at[some])
    return statistic


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("budget", BUDGETS)
def test_ranks_and_regressions_say_the_same(budget, there, tmp_path):
    few = ("hidden_rank", "nonlinearity", "interactions", "contraction")
    tables = _compare("llama", there, tmp_path, layers=(1,), budget=BUDGETS[budget], analyzers=few)
    assert (tables["hidden_rank"]["sketch"].max() > 0) == (budget == "sketched")


@pytest.mark.parametrize("architecture", WIDE)
def test_every_analyzer_says_the_same(architecture, tmp_path):
    _alone(_compare, architecture, moved, tmp_path)


@pytest.mark.usefixtures("sketched")
def test_layers_on_two_devices_say_the_same(there, tmp_path):
    def spread(folder, **_):
        hf = AutoModelForCausalLM.from_pretrained(folder).eval()
        at = places(hf, str(FIRST)) | {"transformer.h.2": str(SECOND), "transformer.ln_f": str(SECOND)}
        return load_model(
            dispatch_model(hf, at, force_hooks=True), tokenizer=AutoTokenizer.from_pretrained(folder)
        )

    backward = ("knockout", "gradient_flow")  # one device is all that gradients are played on
    few = tuple(name for name in ANALYSES if name not in ("neuron_clusters", "cluster_labels", *backward))
    _compare("gpt2", partial(there, spread), tmp_path, {FIRST, SECOND}, analyzers=few)


FAMILIES = {
    "claims_family": {},
    "contraction_family": {"held_out": 512},
    "expansion": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_the_same(name):
    _alone(_compare_family, name)


def _compare_family(name):
    def measured(device):
        load = partial(load_model, device=device)
        specs = ["tiny-x1", "tiny-swiglu-x1"]
        return getattr(fp, name)(specs, fp.load_corpus(), tokens=2048, load=load, **FAMILIES[name]).to_frame()

    one = measured("cpu")
    with moved() as device:
        other = measured(device)
    pd.testing.assert_frame_equal(other, one, rtol=1e-6, atol=1e-9)


def _alone(function, *given):
    """In a process of its own: torch counts the devices that gradients flow on at the first gradient."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_first) as pool:
        pool.submit(_alike, function, *given).result()


def _first():
    torch.set_num_threads(1)
    with elsewhere():
        pass


def _alike(function, *given):
    with alike():
        function(*given)


def _compare(architecture, there, tmp_path, devices=frozenset({FIRST}), **more):
    folder = zoo.save(architecture, tmp_path / "model", **WIDE[architecture])
    settings = Settings(str(folder), tokens=1024, batch=2, shard=512, **more)
    build.build_report(settings, tmp_path / "here", Inline(1))
    with there():
        model = build.work_of(settings, print).model
        assert {ffn.keys.device for ffn in ffns(model)} == devices
        build.build_report(settings, tmp_path / "there", Inline(1))
    tables = {path.stem: pd.read_parquet(path) for path in (tmp_path / "here" / "tables").iterdir()}
    assert len(tables) >= len(settings.analyzers or ANALYSES)
    for name, table in tables.items():
        other = pd.read_parquet(tmp_path / "there" / "tables" / f"{name}.parquet")
        pd.testing.assert_frame_equal(other, table, rtol=1e-6, atol=1e-9)
    return tables
