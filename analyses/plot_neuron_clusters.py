"""Do neurons form groups, do the groups come back, and do neurons that read alike write alike?

python analyses/plot_neuron_clusters.py [MODEL] [--layers 0,3-5] [--tokens N] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import neuron_clusters

options = arguments(__doc__)
save(neuron_clusters(*load(options), layers=options.layers, seed=options.seed), options)
