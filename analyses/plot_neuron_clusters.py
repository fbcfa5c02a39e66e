"""Do neurons form groups, and do neurons that read alike write alike?

python analyses/plot_neuron_clusters.py [MODEL] [--layers 0,3-5] [--seed S]
"""

from common import arguments, save

from ffnprobe import load_model, neuron_clusters

options = arguments(__doc__)
save(neuron_clusters(load_model(options.model), layers=options.layers, seed=options.seed), options)
