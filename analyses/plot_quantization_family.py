"""Does more width give finer quantisation and more clusters, in models that differ in the width alone?

python analyses/plot_quantization_family.py [MODEL ...] [--corpus FILE] [--tokens N] [--seed S]

Without models: the tiny models that come with ffnprobe, on text they were not trained on.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from ffnprobe import experts, load_corpus, load_model, pack, quantization, quantization_family, tokenizer_of
from ffnprobe.family import MEMBERS
from ffnprobe.figure import save_figure
from ffnprobe.shipped import shipped

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="*", default=list(MEMBERS))
parser.add_argument("--corpus", default=shipped("tiny/heldout.jsonl", "the held-out text", "give --corpus FILE"))
parser.add_argument("--tokens", type=int, default=24_576)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()

corpus = load_corpus(options.corpus)
coded, kept = [], []
for name in options.models:
    print(f"measuring {name}", flush=True)
    model = load_model(name)
    tokens = pack(corpus, tokenizer_of(model), tokens=options.tokens, seed=options.seed)
    coded.append(quantization(model, tokens, sample=8192, seed=options.seed))
    kept.append(experts(model, tokens, seed=options.seed))
result = quantization_family(coded, kept)
stem = options.out / f"{result.name}-tiny"
save_figure(result.plot(), stem)
result.save(stem.with_suffix(".parquet"))
print(*result.findings(), *(f"{v.verdict}: {v.measured}" for v in result.verdicts()), f"{stem}.png", sep="\n")
