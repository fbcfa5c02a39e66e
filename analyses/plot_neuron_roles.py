"""What is each neuron for: does it promote tokens, detect one, count positions, set the confidence, or nothing?

python analyses/plot_neuron_roles.py [MODEL] [--tokens N] [--layers 0,3-5] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import neuron_roles

options = arguments(__doc__)
model, tokens = load(options)
save(neuron_roles(model, tokens, layers=options.layers, seed=options.seed), options)
