"""What every script shares: its options, its model and tokens, and where its figure and table go."""

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from ffnprobe import Result, load_corpus, load_model, pack
from ffnprobe.corpus import LENGTH, Tokens
from ffnprobe.figure import save_figure
from ffnprobe.models import Model, context_length, tokenizer_of
from ffnprobe.options import parse_layers


def arguments(description: str | None, model: str = "smollm2-135m") -> Namespace:
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=model)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--layers", type=parse_layers)
    parser.add_argument("--corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    return parser.parse_args()


def load(options: Namespace) -> tuple[Model, Tokens]:
    model = load_model(options.model)
    corpus = load_corpus(options.corpus)
    length = min(LENGTH, context_length(model))
    return model, pack(corpus, tokenizer_of(model), tokens=options.tokens, length=length, seed=options.seed)


def save(result: Result, options: Namespace) -> None:
    stem = options.out / f"{result.name}-{Path(options.model).name}"
    save_figure(result.plot(), stem)
    result.save(stem.with_suffix(".parquet"))
    print(*result.findings(), f"{stem}.png", sep="\n")
