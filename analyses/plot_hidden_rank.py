"""How many directions do activations use before, inside and after the expansion?

python analyses/plot_hidden_rank.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import hidden_rank

options = arguments(__doc__)
model, tokens = load(options)
save(hidden_rank(model, tokens, layers=options.layers, seed=options.seed), options)
