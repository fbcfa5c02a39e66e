"""How many directions do the keys read and the values write?

python analyses/plot_weight_rank.py [MODEL] [--layers 0,3-5] [--seed S]
"""

from common import arguments, save

from ffnprobe import load_model, weight_rank

options = arguments(__doc__)
save(weight_rank(load_model(options.model), layers=options.layers, seed=options.seed), options)
