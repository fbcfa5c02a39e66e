"""Over how many directions does a layer pass gradients, and how much more passes with it than without?

python analyses/plot_gradient_flow.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import gradient_flow

options = arguments(__doc__)
model, tokens = load(options)
save(gradient_flow(model, tokens, layers=options.layers, seed=options.seed), options)
