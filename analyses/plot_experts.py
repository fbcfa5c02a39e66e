"""How few of a layer's neurons does a token need, if they come in experts?

python analyses/plot_experts.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import experts

options = arguments(__doc__)
model, tokens = load(options)
save(experts(model, tokens, layers=options.layers, seed=options.seed), options)
