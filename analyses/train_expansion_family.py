"""Train the tiny models: `python analyses/train_expansion_family.py tiny-x4`; the same command again goes on.

Every member sees the same tokens in the same order. On the CPU use one thread a process (OMP_NUM_THREADS=1) and a
process a core. A folder RUNS/NAME-SEED holds the checkpoint, the loss curve and, at the end, the model in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from ffnprobe.disk import atomic_write
from ffnprobe.family import CONTEXT, END, MEMBERS, Member

TINY = Path(__file__).parents[1] / "data/tiny"


@dataclass(frozen=True)
class Schedule:
    """AdamW; warmup, then half a cosine down to `last` of the peak."""

    tokens: int = 12_582_912
    batch: int = 8  # sequences
    peak: float = 4e-3
    warmup: int = 200  # steps
    last: float = 0.1
    decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * CONTEXT)

    def rate(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.peak * (self.last + (1 - self.last) * (1 + math.cos(math.pi * done)) / 2)


def packed(split: str, folder: Path = TINY) -> Tensor:
    """The split's documents in sequences of CONTEXT tokens, END before each document: [sequences, CONTEXT]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    if not (folder / f"{split}.jsonl").is_file():
        raise SystemExit(f"{folder / f'{split}.jsonl'} is not there: python data/recipes/tiny.py makes it")
    with open(folder / f"{split}.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = [i for encoded in tokenizer.backend_tokenizer.encode_batch(texts) for i in [END, *encoded.ids]]
    return torch.tensor(ids[: len(ids) // CONTEXT * CONTEXT]).view(-1, CONTEXT)


def order(sequences: int, steps: int, batch: int, seed: int) -> Tensor:
    """Which sequences each step sees, epoch after epoch in another order: [steps, batch]."""
    random = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch / sequences)
    return torch.cat([torch.randperm(sequences, generator=random) for _ in range(epochs)])[: steps * batch].view(
        steps, batch
    )


def losses(model: transformers.PreTrainedModel, tokens: Tensor) -> Tensor:
    """Cross-entropy of every next token, nats: [tokens]."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=model.training):
        logits = model(input_ids=tokens, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").float()


@torch.inference_mode()
def held_out(model: transformers.PreTrainedModel, tokens: Tensor) -> float:
    """Mean loss in float32, nats a token."""
    model.eval()
    total = torch.cat([losses(model, batch.to(model.device)) for batch in tokens.split(8)]).mean().item()
    model.train()
    return total


class Training:
    """A model, its optimiser and how far it is."""

    def __init__(self, member: Member, seed: int, schedule: Schedule, device: str) -> None:
        self.schedule = schedule
        self.model = member.at_step_0(seed).train()
        self.model.to(torch.device(device))  # type: ignore[arg-type]  # of a wrapped method
        # flash attention has no advantage at 256 tokens on a CPU, and is slower
        self.model.set_attn_implementation("eager" if device == "cpu" else "sdpa")
        self.parameters = dict(self.model.named_parameters())
        groups = [
            {"params": [p for p in self.parameters.values() if p.dim() >= 2], "weight_decay": schedule.decay},
            {"params": [p for p in self.parameters.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=schedule.peak, betas=schedule.betas)
        self.step = 0

    def advance(self, tokens: Tensor) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        loss = losses(self.model, tokens.to(self.model.device)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path, curve: list[dict[str, float]], recipe: str) -> None:
        """Parameters and the optimiser's moments, with the curve so far."""
        tensors = {f"parameter/{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}/{name}": t for key, t in self.optimiser.state[p].items()}
        text = {"step": str(self.step), "curve": json.dumps(curve), "recipe": recipe}
        atomic_write(path, lambda temporary: save_file(tensors, temporary, text))

    def load(self, path: Path, recipe: str) -> list[dict[str, float]]:
        with safe_open(path, "pt") as file:
            text = file.metadata()
            if text["recipe"] != recipe:
                raise SystemExit(f"{path} was begun as {text['recipe']}, not as {recipe}: give another --out")
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(file.get_tensor(f"parameter/{name}"))
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    self.optimiser.state[p] = {key: file.get_tensor(f"{key}/{name}").to(p.device) for key in keys}
                    self.optimiser.state[p]["step"] = self.optimiser.state[p]["step"].cpu()
        self.step = int(text["step"])
        return json.loads(text["curve"])


def train(
    member: Member, seed: int, out: Path, device: str, schedule: Schedule, every: int = 250, corpus: Path = TINY
) -> Path:
    """Train to the end, from the checkpoint in the folder if there is one; the folder."""
    folder = out / f"{member.name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model").is_dir():
        return folder
    training_set, held = packed("train", corpus), packed("heldout", corpus)
    rows = order(len(training_set), schedule.steps, schedule.batch, seed)
    recipe = json.dumps({"member": member.name, "seed": seed, **asdict(schedule)})
    training, curve = Training(member, seed, schedule, device), []
    if (folder / "checkpoint.safetensors").is_file():
        curve = training.load(folder / "checkpoint.safetensors", recipe)
    recent: list[float] = []
    while training.step < schedule.steps:
        recent.append(training.advance(training_set[rows[training.step]]))
        if training.step % every == 0 or training.step == schedule.steps:
            here = {"step": training.step, "tokens": training.step * schedule.batch * CONTEXT}
            mean = sum(recent) / len(recent)
            curve.append(here | {"train": mean, "held_out": held_out(training.model, held[:128])})
            recent.clear()
            training.save(folder / "checkpoint.safetensors", curve, recipe)
            print(member.name, seed, curve[-1], flush=True)
    facts = {
        **json.loads(recipe),
        "parameters": sum(p.numel() for p in training.parameters.values()),
        "held_out": held_out(training.model, held),
        "curve": curve,
        "device": device,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    training.model.save_pretrained(folder / "model")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("members", nargs="*", choices=[*MEMBERS, []], default=list(MEMBERS), metavar="MEMBER")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/expansion"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=Schedule.tokens)
    given = parser.parse_args()
    for name in given.members:
        train(MEMBERS[name], given.seed, given.out, given.device, Schedule(tokens=given.tokens))
