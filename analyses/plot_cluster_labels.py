"""What do the neurons of a cluster share: tokens that trigger them, tokens that they write, or a topic?

python analyses/plot_cluster_labels.py [MODEL] [--layers 0,3-5] [--tokens N] [--corpus FILE] [--seed S]
"""

from common import arguments, load, save

from ffnprobe import cluster_labels, load_corpus

options = arguments(__doc__)
corpus = load_corpus(options.corpus)
save(cluster_labels(*load(options), corpus, layers=options.layers, seed=options.seed), options)
