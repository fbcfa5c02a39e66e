"""What do contraction, pruning, FFN and attention matter as models differ in the expansion ratio alone?

python analyses/plot_contraction_family.py [MODEL ...] [--corpus FILE] [--tokens N] [--layers 0,3-5] [--seed S]

Without models: the tiny models that come with ffnprobe, on text they were not trained on.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ffnprobe import contraction_family, load_corpus
from ffnprobe.family import MEMBERS
from ffnprobe.figure import save_figure
from ffnprobe.options import parse_layers
from ffnprobe.shipped import shipped

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="*", default=list(MEMBERS))
parser.add_argument("--corpus", default=shipped("tiny/heldout.jsonl", "the held-out text", "give --corpus FILE"))
parser.add_argument("--tokens", type=int, default=16_384)
parser.add_argument("--layers", type=parse_layers)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()

result = contraction_family(
    options.models,
    load_corpus(options.corpus),
    tokens=options.tokens,
    held_out=min(2048, options.tokens // 4),
    layers=options.layers,
    seed=options.seed,
    say=print,
)
stem = options.out / f"{result.name}-tiny"
save_figure(result.plot(), stem)
result.save(stem.with_suffix(".parquet"))
print(*result.findings(), f"{stem}.png", sep="\n")
