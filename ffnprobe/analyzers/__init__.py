"""One question a file."""

from .cluster_labels import ClusterLabels as ClusterLabels
from .cluster_labels import cluster_labels as cluster_labels
from .expansion import Expansion as Expansion
from .expansion import expansion as expansion
from .expansion_fits import ExpansionFits as ExpansionFits
from .expansion_fits import expansion_fits as expansion_fits
from .hidden_rank import HiddenRank as HiddenRank
from .hidden_rank import hidden_rank as hidden_rank
from .memories import Memories as Memories
from .memories import memories as memories
from .memory_edit import Edit as Edit
from .memory_edit import MemoryEdit as MemoryEdit
from .memory_edit import memory_edit as memory_edit
from .nested import Nested as Nested
from .nested import nested as nested
from .neuron_clusters import NeuronClusters as NeuronClusters
from .neuron_clusters import neuron_clusters as neuron_clusters
from .neuron_map import NeuronMap as NeuronMap
from .neuron_map import neuron_map as neuron_map
from .recall import Recall as Recall
from .recall import recall as recall
from .svd_directions import SVDDirections as SVDDirections
from .svd_directions import svd_directions as svd_directions
from .weight_rank import WeightRank as WeightRank
from .weight_rank import weight_rank as weight_rank
