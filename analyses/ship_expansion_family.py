"""Turn finished trainings into the models that come with ffnprobe: `python analyses/ship_expansion_family.py`.

A folder RUNS/NAME-SEED becomes OUT/NAME: weights in float16, tokenizer, loss curve, what is known of the training
and a card that is written from it. The same training gives the same bytes again.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent, wrap
from typing import Any

import torch
from ngrams import ngram_losses
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_expansion_family import TINY, held_out, packed
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ffnprobe.disk import atomic_write
from ffnprobe.family import CONTEXT, D_MODEL, END, HEADS, LAYERS, MEMBERS, VOCABULARY, digest
from ffnprobe.hub import PROVENANCE, quiet

MODELS = TINY.parent / "models"
PROMPT = "He said that"


@dataclass(frozen=True)
class Yardstick:
    """The held-out tokens, and what counts on the training set make of them, nats a token."""

    held: Tensor
    bytes_per_token: float
    unigram: float
    bigram: float

    @classmethod
    def of(cls, corpus: Path) -> Yardstick:
        held = packed("heldout", corpus)
        pieces = AutoTokenizer.from_pretrained(corpus / "tokenizer").convert_ids_to_tokens([*range(VOCABULARY)])
        sizes = torch.tensor([len(piece) for piece in pieces])  # each character of a piece stands for a byte
        sizes[END] = 0
        per_token = sizes[held[:, 1:]].double().mean().item()
        return cls(held, per_token, *ngram_losses(packed("train", corpus), held, VOCABULARY))

    def row(self, what: str, loss: float) -> str:
        return f"| {what} | {loss:.3f} | {loss / math.log(2) / self.bytes_per_token:.3f} |"


def ship(run: Path, out: Path, yardstick: Yardstick, corpus: Path = TINY) -> dict[str, Any]:
    """Write the folder OUT/NAME; what its training.json holds."""
    facts = json.loads((run / "training.json").read_text())
    folder, curve = out / facts["member"], facts.pop("curve")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((corpus / "tokenizer").iterdir()):
        shutil.copyfile(file, folder / file.name)
    config = json.loads((run / "model/config.json").read_text()) | {"dtype": "float16"}
    _write_json(folder / "config.json", config)
    weights = {name: weight.half() for name, weight in load_file(run / "model/model.safetensors").items()}
    atomic_write(folder / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    millions = f"{facts['tokens'] / 1e6:.1f} million tokens"
    note = f"a tiny model, trained by ffnprobe on {millions} and stored in float16"
    _write_json(folder / PROVENANCE, {"note": note})
    with open(folder / "loss.csv", "w", newline="") as lines:
        table = csv.DictWriter(lines, curve[0], lineterminator="\n")
        table.writeheader()
        table.writerows(curve)

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    facts |= {
        "held_out_float16": round(held_out(model, yardstick.held), 6),
        "unigram": round(yardstick.unigram, 6),
        "bigram": round(yardstick.bigram, 6),
        "bytes_per_token": round(yardstick.bytes_per_token, 6),
        "step_0_sha256": digest(MEMBERS[facts["member"]].at_step_0(facts["seed"]).state_dict()),
    }
    _write_json(folder / "training.json", facts)
    texts = samples(model, AutoTokenizer.from_pretrained(folder))
    (folder / "README.md").write_text(card(facts, yardstick, texts), encoding="utf-8")
    return facts


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Two texts that begin with PROMPT, at temperature 0.8 and seed 0."""
    ids = torch.tensor([[END, *tokenizer.encode(PROMPT, add_special_tokens=False)]] * 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"max_new_tokens": 60, "pad_token_id": END, "attention_mask": torch.ones_like(ids)}
        found = model.eval().generate(ids, do_sample=True, temperature=0.8, top_k=0, **options)
    return tokenizer.batch_decode(found, skip_special_tokens=True)


def card(facts: dict[str, Any], yardstick: Yardstick, texts: list[str]) -> str:
    member = MEMBERS[facts["member"]]
    kind = "Llama (RMSNorm, rotary positions, SwiGLU)" if member.gated else "GPT-2 (LayerNorm, GELU)"
    steps = facts["tokens"] // (facts["batch"] * CONTEXT)
    rows = [
        yardstick.row("unigram", yardstick.unigram),
        yardstick.row("bigram", yardstick.bigram),
        yardstick.row("this model, float32 as trained", facts["held_out"]),
        yardstick.row("this model, float16 as stored", facts["held_out_float16"]),
    ]
    return CARD.format(
        **facts,
        kind=kind,
        sizes=f"{LAYERS} layers, d_model {D_MODEL}, d_mlp {member.d_mlp:,} (expansion {member.expansion:.3g})",
        rest=f"{HEADS} heads, context {CONTEXT}, vocabulary {VOCABULARY:,}, tied embeddings",
        steps=steps,
        final=facts["peak"] * facts["last"],
        rows="\n".join(rows),
        prompt=PROMPT,
        samples="\n\n---\n\n".join(map(quoted, texts)),
    )


def quoted(text: str) -> str:
    """A code block: nothing in it is Markdown."""
    lines = [piece for line in text.strip().splitlines() for piece in wrap(line, 100) or [""]]
    return indent("\n".join(lines), "    ")


CARD = """# {member}

{kind}: {sizes},
{rest}. {parameters:,} parameters.

One of nine models, six GPT-2 and three Llama, made to measure what the expansion ratio does: within each kind they
differ in nothing else. `ffnprobe report {member}` measures it, `ffnprobe.load_model("{member}")` loads it,
and so does transformers, from this folder.

## Held-out loss

| | nats a token | bits a byte |
|---|---|---|
{rows}

Unigram and bigram (`analyses/ngrams.py`) were counted on the same training set; all four read the same held-out
tokens, none of whose documents is in the training set.

## Training

{tokens:,} tokens in {steps:,} steps of {batch} sequences, seed {seed}; with one seed every member
sees the same tokens in the same order. AdamW, betas {betas[0]} and {betas[1]}, weight decay {decay} on matrices,
gradients clipped at norm {clip:g}; learning rate up to {peak:g} in {warmup} steps, then half a cosine down
to {final:g}. Forward pass in bfloat16, weights and moments in float32.

`loss.csv`: the mean training loss since the line before, and the loss on the first 128 held-out sequences.
`training.json`: every setting, the versions, and the sha256 of the untrained weights, `step_0_sha256`: where
`digest(MEMBERS["{member}"].at_step_0({seed}).state_dict())` of `ffnprobe.family` equals it, training
starts from the same weights. `python analyses/train_expansion_family.py {member} --seed {seed}` trains it again.

## Data and licences

Jane Austen, Shakespeare, the King James Bible, WordNet 3.0 and Python's documentation: [what exactly, and under
which licences](../../tiny/README.md). The weights are under ffnprobe's MIT licence.

## What it writes

After "{prompt}", at temperature 0.8, the first two samples of seed 0:

{samples}

## What it is not

A language model to use. It is tiny, saw a narrow and dated corpus with the views of its authors, was not tuned to
follow instructions, and what it writes is neither true nor safe.
"""


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("members", nargs="*", choices=[*MEMBERS, []], default=list(MEMBERS), metavar="MEMBER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/expansion"))
    parser.add_argument("--out", type=Path, default=MODELS)
    given = parser.parse_args()
    yardstick = Yardstick.of(TINY)
    for name in given.members:
        run = given.runs / f"{name}-{given.seed}"
        if not (run / "model/model.safetensors").is_file():
            print(f"{name}: {run} is not finished, left out")
            continue
        facts = ship(run, given.out, yardstick)
        keys = ("held_out", "held_out_float16", "unigram", "bigram")
        print(f"{name}:", *(f"{key} {facts[key]:.3f}" for key in keys))
