"""What decides what a report says?"""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote

from ..analyzers.rank_probes import BUDGET
from ..corpus import Corpus, load_corpus, load_dataset_corpus
from ..errors import InputError
from ..stream import BATCH, SINK_FACTOR


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a report says; written to run.json."""

    model: str
    tokens: int = 16_384
    layers: tuple[int, ...] | None = None
    corpus: str | None = None
    dataset: str | None = None
    seed: int = 0
    sink_factor: float = SINK_FACTOR
    nonfinite: str = "stop"
    batch: int = BATCH
    shard: int | None = None
    budget: int = BUDGET  # bytes of all moments
    dtype: str = "float32"
    device_map: str | None = None
    analyzers: tuple[str, ...] | None = None  # all by default

    def __post_init__(self) -> None:
        if self.corpus and self.dataset:
            raise InputError("got both --corpus and --dataset: give one of them")

    def text(self) -> Corpus:
        """The corpus that tokens are packed from."""
        return load_dataset_corpus(self.dataset) if self.dataset else load_corpus(self.corpus)

    def command(self, out: str) -> str:
        """The command line that makes this report again."""
        options = [f"--tokens {self.tokens}"] if self.tokens != Settings.tokens else []
        options += [f"--layers {','.join(map(str, self.layers))}"] if self.layers is not None else []
        options += [f"--{name} {quote(value)}" for name in ("corpus", "dataset") if (value := getattr(self, name))]
        options += [f"--seed {self.seed}"] if self.seed else []
        options += [f"--sink-factor {self.sink_factor:g}"] if self.sink_factor != SINK_FACTOR else []
        options += [f"--nonfinite {self.nonfinite}"] if self.nonfinite != "stop" else []
        options += [f"--batch {self.batch}"] if self.batch != BATCH else []
        options += [f"--shard {self.shard}"] if self.shard else []
        options += [f"--budget {self.budget}"] if self.budget != BUDGET else []
        options += [f"--dtype {quote(self.dtype)}"] if self.dtype != Settings.dtype else []
        options += [f"--device-map {quote(self.device_map)}"] if self.device_map else []
        options += [f"--only {','.join(self.analyzers)}"] if self.analyzers is not None else []
        return " ".join(["ffnprobe report", quote(self.model), *options, f"--out {quote(out)}"])
