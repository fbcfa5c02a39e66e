"""Half precision is sound, and a model that accelerate has spread is measured where its parts lie."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from accelerate import dispatch_model
from test_models import FAULTS, KNOWN, few_tokens
from test_stream import tokens_of
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ffnprobe.analyzers import hidden_rank, weight_rank
from ffnprobe.check import check
from ffnprobe.errors import InputError, ModelRefused
from ffnprobe.models import check_model, describe, ffns, load_model, plain, taps
from ffnprobe.placement import dispatched, refuse_split_layers
from ffnprobe.run import run
from ffnprobe.shards import Work
from ffnprobe.statistics import CoActivation, FiringRate, Marginals, Moments, SketchedMoments, TopActivations
from ffnprobe.stream import Probe, capture, collect

pytestmark = pytest.mark.slow  # a quarter of a minute

HALF = (torch.bfloat16, torch.float16)
FolderOf = Callable[[str], Path]
both = pytest.mark.parametrize("architecture", ["gpt2", "llama"])


def places(hf: PreTrainedModel, device: str = "cpu") -> dict[str, str]:
    """A device map that names every block."""
    found = {"lm_head": device}
    for name, part in hf.base_model.named_children():
        whole = f"{hf.base_model_prefix}.{name}"
        blocks = [f"{whole}.{i}" for i in range(len(part))] if isinstance(part, nn.ModuleList) else [whole]
        found |= dict.fromkeys(blocks, device)
    return found


def spread(folder: Path) -> PreTrainedModel:
    """Dispatched as over several devices, hooks and all; a machine without GPUs has only the one device."""
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    return dispatch_model(hf, places(hf), force_hooks=True)


def moments(model, site: str = "post") -> torch.Tensor:
    probes = {f"{layer}": Probe(layer, site, Moments.about) for layer in range(3)}
    found = collect(model, tokens_of(model), probes, batch=2)
    return torch.stack([found[f"{layer}"].compute().centred for layer in range(3)])


# half precision


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_shows_the_same_architecture(dtype: torch.dtype, architecture: str, folder_of: FolderOf):
    if architecture == "olmo2":  # a fault of transformer_lens 4.3.0
        with pytest.raises(ModelRefused, match=r"cannot run olmo2 in .*float16 .*: use float32"):
            load_model(folder_of(architecture), device="cpu", dtype=dtype)
        return
    result = check_model(load_model(folder_of(architecture), device="cpu", dtype=dtype))
    seen = {(row.d_mlp, row.activation, row.form) for row in result.layers}
    assert result.ok and seen == {KNOWN[architecture]}


@pytest.mark.parametrize(
    ("architecture", "fault"),
    [
        ("gpt2", "another layer's keys"),
        ("gpt2", "two neurons' values exchanged"),
        ("gpt2", "no bias"),
        ("gpt2", "no key bias"),
        ("llama", "another layer's values"),
        ("llama", "gate and key exchanged"),
    ],
)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_self_check_sees_in_half_precision(dtype, architecture: str, fault: str, folder_of: FolderOf):
    model = load_model(folder_of(architecture), device="cpu", dtype=dtype)
    good = ffns(model)
    bad = [FAULTS[fault](good[0], good[1]), *good[1:]]
    result = check(model, plain(model), taps(model), bad, few_tokens())
    assert [row.ok for row in result.layers] == [False, True, True]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_statistics_of_half_precision_are_summed_wide(dtype: torch.dtype, folder_of: FolderOf):
    model = load_model(folder_of("gpt2"), device="cpu", dtype=dtype)
    tokens = tokens_of(model, sequences=12)
    kinds = (Moments, SketchedMoments, Marginals, CoActivation, FiringRate, TopActivations)
    probes = {kind.__name__: Probe(1, "post", kind.about) for kind in kinds}
    probes["SketchedMoments"] = Probe(1, "post", lambda x: SketchedMoments.about(x, k=36))
    found = collect(model, tokens, probes, batch=12)
    (seen,) = (batch[1] for batch in capture(model, tokens, layers=[1], batch=12))
    assert seen.sites["post"].dtype == dtype
    x = seen.sites["post"][seen.kept].double()
    close = {"rtol": 1e-5, "atol": 1e-6}  # a square that was rounded to half precision is off by 1e-3
    covariance = torch.cov(x.T, correction=0)
    torch.testing.assert_close(found["Moments"].compute().centred, covariance, **close)
    sketched = found["SketchedMoments"].compute()
    torch.testing.assert_close(sketched.product, covariance @ sketched.test.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["Marginals"].compute().variance, x.var(0, correction=0), **close)
    threshold = found["CoActivation"].tensors()["threshold"].double()
    active = (x.abs() > threshold).double()
    assert torch.equal(found["CoActivation"].compute().both.double(), active.T @ active)
    torch.testing.assert_close(found["FiringRate"].compute(), (x > 0).double().mean(0))
    assert torch.equal(found["TopActivations"].compute().activation.double(), x.sort(0, descending=True)[0][:20].T)


@both
def test_ranks_of_rounded_weights_are_those_of_the_rounding_alone(architecture: str, folder_of: FolderOf):
    half = load_model(folder_of(architecture), device="cpu", dtype="bfloat16")
    hf = AutoModelForCausalLM.from_pretrained(folder_of(architecture), dtype=torch.bfloat16).float()
    same = load_model(hf, tokenizer=zoo.tokenizer())  # the same weights in float32
    assert weight_rank(half).rows == weight_rank(same).rows
    for ffn in ffns(half):
        assert ffn.canonical().keys.dtype == ffn.gauge.dtype == torch.float32
    tokens = tokens_of(half, sequences=12)
    for one, other in zip(hidden_rank(half, tokens).rows, hidden_rank(same, tokens).rows, strict=True):
        assert one.soft_rank == pytest.approx(other.soft_rank, rel=0.05)
        assert one.soft_rank_null == pytest.approx(other.soft_rank_null, rel=0.05)


def test_an_unknown_dtype_is_said():
    with pytest.raises(InputError, match='dtype "half" is unknown: choose from float32, bfloat16, float16'):
        load_model("nowhere", dtype="half")


# spread over devices


@both
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_a_device_map_changes_no_number(architecture: str, device_map, folder_of: FolderOf, model_of):
    if torch.cuda.is_available() and device_map == "auto":
        pytest.skip("auto takes the GPU")
    model = load_model(folder_of(architecture), device_map=device_map)
    assert torch.equal(moments(model), moments(model_of(architecture)))


@both
def test_a_dispatched_model_is_measured_as_any_other_and_never_moved(
    architecture: str, folder_of: FolderOf, model_of, monkeypatch
):
    hf = spread(folder_of(architecture))
    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "to", lambda *_, **__: pytest.fail("a dispatched model was moved"))
        model = load_model(hf, tokenizer=zoo.tokenizer())
    assert dispatched(plain(model)) and check_model(model).ok
    for site in ("in", "post", "out"):
        assert torch.equal(moments(model, site), moments(model_of(architecture), site))
    names = dict(plain(model).named_modules())
    hooked = {name: module for name, module in names.items() if hasattr(module, "_hf_hook")}
    assert len(hooked) > 20
    for name, module in hooked.items():  # the twin's hooks run the twin, not the model that it was copied from
        assert module._old_forward.__self__ is module and module.forward.args[0] is module, name
        assert hf.get_submodule(name)._old_forward.__self__ is not module
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hf.modules())


def test_what_lies_elsewhere_is_refused(folder_of: FolderOf):
    hf = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    on_disk = places(hf) | {"transformer.h.1": "disk"}
    with pytest.raises(ModelRefused, match=r"the first is transformer\.h\.1\.ln_1\.weight: give it more GPUs, or"):
        load_model(folder_of("gpt2"), device_map=on_disk)


def test_options_that_do_not_go_together_are_said(folder_of: FolderOf):
    with pytest.raises(InputError, match="both device and device_map: give one of them"):
        load_model(folder_of("gpt2"), device="cpu", device_map="auto")
    with pytest.raises(InputError, match="loaded already: give it to from_pretrained"):
        load_model(zoo.build("gpt2"), tokenizer=zoo.tokenizer(), device_map="auto")
    with pytest.raises(InputError, match="spread over devices already: leave out device"):
        load_model(spread(folder_of("gpt2")), tokenizer=zoo.tokenizer(), device="cpu")
    with pytest.raises(InputError, match=r"correct device_map \('everywhere'\)"):
        load_model(folder_of("gpt2"), device_map="everywhere")


def test_a_layer_on_two_devices_is_said(folder_of: FolderOf):
    model = load_model(folder_of("gpt2"), device="cpu")
    (first, *_) = taps(model)
    first.down.to("meta")
    with pytest.raises(InputError, match="layer 0 is split over cpu, meta: give a device_map that keeps"):
        refuse_split_layers([first], "gpt2")


# what a run remembers


def test_a_run_goes_on_in_its_own_dtype_only(folder_of: FolderOf, tmp_path: Path):
    def begin(dtype: str):
        model = load_model(folder_of("gpt2"), device="cpu", dtype=dtype)
        work = Work(model, tokens_of(model), {"h": Probe(0, "post", Moments.about)})
        with run(tmp_path / "run", lambda say: work) as (_, outcome):
            return outcome

    assert begin("bfloat16").bit_equal and begin("bfloat16").bit_equal
    with pytest.raises(InputError, match="dtype 'bfloat16', now 'float32'"):
        begin("float32")


def test_describe_says_the_dtype(folder_of: FolderOf):
    assert describe(load_model(folder_of("gpt2"), device="cpu", dtype="float16"))["dtype"] == "float16"
