"""What does it cost to read every value in the vocabulary, against the whole float32 product with topk?

python benchmarks/reading.py [--rounds N]
"""

import argparse

import torch
from bench import forget_peak, load, machine, ratios, resident, table

from ffnprobe.models import ffns
from ffnprobe.unembedding import unembedding
from ffnprobe.vocabulary import HELD, read_values

K = 20

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--rounds", type=int, default=5)
rounds = parser.parse_args().rounds
model = load("smollm2-135m")
words = unembedding(model)
values = torch.cat([ffn.values.float() for ffn in ffns(model)])
some = values[:: len(values) // 4608]


def whole(round_: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both ends of the whole product, as much of it at a time as `read_values` holds."""
    chunks = (chunk @ words.mT for chunk in some.split(HELD // (4 * len(words))))
    return [(score.topk(K, dim=1).indices, score.topk(K, dim=1, largest=False).indices) for score in chunks]


found = ratios(rounds, whole, {"read_values": lambda round_: read_values(some, words, K)})
print(machine())
cells = [[name, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"] for name, (low, middle, high) in found.items()]
print(table(["way", "median ratio", "quartiles"], cells))
expected = [torch.cat(ends) for ends in zip(*whole(0), strict=True)]
differing = sum(int((a != b).sum()) for a, b in zip(read_values(some, words, K), expected, strict=True))
print(f"{differing} of {2 * K * len(some):,} tokens differ: equal to rounding, they change places")
before = resident()
forget_peak()
read_values(values, words, K)
print(f"{(resident('VmHWM') - before) / 1e6:.0f} MB held for all {len(values):,} neurons")
