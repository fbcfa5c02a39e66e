"""Which neurons of a layer are active together, and where do they lie?

python analyses/plot_neuron_map.py [MODEL] [--layers 0,3-5] [--tokens N] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import neuron_map

options = arguments(__doc__)
save(neuron_map(*load(options), layers=options.layers, seed=options.seed), options)
