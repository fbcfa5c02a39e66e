"""What does the contraction keep of the hidden activation, and could something cheaper keep it?

python analyses/plot_contraction.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import contraction

options = arguments(__doc__)
model, tokens = load(options)
held_out = min(1024, tokens.n // 4)
save(contraction(model, tokens, layers=options.layers, held_out=held_out, seed=options.seed), options)
