"""How much of the work do attention and FFN do, and does the one need or replace the other?

python analyses/plot_attention_share.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import attention_share

options = arguments(__doc__)
model, tokens = load(options)
held_out = min(1024, tokens.n // 4)
save(attention_share(model, tokens, layers=options.layers, held_out=held_out, seed=options.seed), options)
