"""How does the rank of a trained layer's h grow with the neurons that are kept of it?

python analyses/plot_nested.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import nested

options = arguments(__doc__)
model, tokens = load(options)
save(nested(model, tokens, layers=options.layers, seed=options.seed), options)
