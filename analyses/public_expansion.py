"""What do public models say of the expansion? This script needs the Hugging Face hub, or folders saved from it.

python analyses/public_expansion.py pythia [MODEL@stepN ...]  ranks of h through the training of one model
python analyses/public_expansion.py t5-efficient [MODEL ...]  ranks of h in encoders that differ in d_ff alone
python analyses/public_expansion.py openelm                   says why it is refused

A model is ID, ID@REVISION or a folder; a folder of the pythia arm has a name that ends in stepN. Only safetensors
are read. T5-Efficient has them in the hub's own conversion, which was never merged and is asked for as @refs/pr/1;
not every checkpoint of a Pythia has them. The widest T5 wants 10 GB of memory and hours: --layers takes a few.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import transformers
from checkpoints import Checkpoints, step_of
from t5_encoder import PER_DOCUMENT, encoder_expansion

from ffnprobe import Result, expansion, expansion_fits, load_corpus
from ffnprobe.errors import FFNProbeError, InputError, MachineError, ModelRefused
from ffnprobe.figure import save_figure
from ffnprobe.hub import REMEDY, locate
from ffnprobe.options import parse_layers

PUBLIC = {
    "pythia": [
        f"EleutherAI/pythia-70m@step{n}" for n in (0, 1, 8, 64, 256, 512, 1000, 4000, 16_000, 64_000, 143_000)
    ],
    "t5-efficient": [
        f"google/t5-efficient-base{width}@refs/pr/1"
        for width in ("-ff1000", "-ff2000", "", "-ff6000", "-ff9000", "-ff12000")
    ],
}

parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
parser.add_argument("arm", choices=[*PUBLIC, "openelm"])
parser.add_argument("models", nargs="*")
parser.add_argument("--documents", type=int, default=256, help=f"at most {PER_DOCUMENT} tokens of each")
parser.add_argument("--layers", help="of t5-efficient, as in 0,3-5; all by default")
parser.add_argument("--corpus", help="a .txt, .jsonl or .parquet file; the built-in corpus by default")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
options = parser.parse_args()


def found(models: Sequence[str]) -> Sequence[str]:
    """All are there before the first is measured."""
    for model in models:
        try:
            locate(model, say=print)
        except MachineError as error:
            reason = str(error).removesuffix(f": {REMEDY}")
            raise MachineError(
                f"{options.arm} needs the Hugging Face hub, or folders saved from it: {reason}"
            ) from error
    return models


def measured() -> list[Result]:
    if options.arm == "openelm":
        raise ModelRefused(
            "OpenELM needs code from the hub, which ffnprobe never runs: "
            f"transformers {transformers.__version__} has no OpenELM of its own"
        )
    models, corpus = options.models or PUBLIC[options.arm], load_corpus(options.corpus)
    layers, seed = parse_layers(options.layers), options.seed
    if options.arm == "t5-efficient":
        ranks = encoder_expansion(
            found(models), corpus, documents=options.documents, layers=layers, seed=seed, say=print
        )
        return [ranks, expansion_fits(ranks, seed)]
    if layers is not None:
        raise InputError("--layers is for t5-efficient: leave it out")
    steps = sorted(models, key=step_of)
    ranks = expansion(found(steps), corpus, tokens=options.documents * PER_DOCUMENT, seed=seed, say=print)
    ends = f"{ranks.rows[0].model} to {ranks.rows[-1].model}"
    return [Checkpoints(ranks.rows, dict(ranks.settings) | {"model": ends})]


try:
    for result in measured():
        stem = options.out / f"{result.name}-{options.arm}"
        save_figure(result.plot(), stem)
        result.save(stem.with_suffix(".parquet"))
        said = (f"{v.verdict}: {v.measured}" for v in result.verdicts())
        print(*result.findings(), *said, f"{stem}.png", sep="\n")
except FFNProbeError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
