"""Which tokens do the singular directions of keys, gates and values stand for?

python analyses/plot_svd_directions.py [MODEL] [--layers 0,3-5] [--seed S]
"""

from common import arguments, save

from ffnprobe import load_model, svd_directions

options = arguments(__doc__)
save(svd_directions(load_model(options.model), layers=options.layers, seed=options.seed), options)
