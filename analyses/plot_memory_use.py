"""How many memories does a token read, and does one of them decide what the layer writes?

python analyses/plot_memory_use.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import memory_use

options = arguments(__doc__)
model, tokens = load(options)
save(memory_use(model, tokens, layers=options.layers, seed=options.seed), options)
