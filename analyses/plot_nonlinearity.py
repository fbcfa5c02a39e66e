"""How much of a feed-forward layer is an affine map of what it reads?

python analyses/plot_nonlinearity.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import nonlinearity

options = arguments(__doc__)
model, tokens = load(options)
save(nonlinearity(model, tokens, layers=options.layers, seed=options.seed), options)
