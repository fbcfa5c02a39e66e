"""One question a file."""

from .hidden_rank import HiddenRank as HiddenRank
from .hidden_rank import hidden_rank as hidden_rank
from .memories import Memories as Memories
from .memories import memories as memories
from .neuron_clusters import NeuronClusters as NeuronClusters
from .neuron_clusters import neuron_clusters as neuron_clusters
from .recall import Recall as Recall
from .recall import recall as recall
from .weight_rank import WeightRank as WeightRank
from .weight_rank import weight_rank as weight_rank
