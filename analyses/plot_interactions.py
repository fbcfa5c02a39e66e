"""How far does a layer act on a sum of two inputs other than on each of them?

python analyses/plot_interactions.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import interactions

options = arguments(__doc__)
model, tokens = load(options)
save(interactions(model, tokens, layers=options.layers, seed=options.seed), options)
