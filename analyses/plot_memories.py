"""What triggers each key, and what does its value write?

python analyses/plot_memories.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import memories

options = arguments(__doc__)
model, tokens = load(options)
save(memories(model, tokens, layers=options.layers, seed=options.seed), options)
