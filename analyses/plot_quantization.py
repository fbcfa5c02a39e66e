"""Does a layer answer with one of a few vectors: how much of its output does a code of the token tell?

python analyses/plot_quantization.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import quantization

options = arguments(__doc__)
model, tokens = load(options)
save(quantization(model, tokens, layers=options.layers, seed=options.seed), options)
