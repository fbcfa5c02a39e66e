"""What does the model lose without a set of neurons, beside random sets?

python analyses/plot_knockout.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import knockout

options = arguments(__doc__)
model, tokens = load(options)
held_out = min(2048, options.tokens // 2)
save(knockout(model, tokens, layers=options.layers, held_out=held_out, seed=options.seed), options)
