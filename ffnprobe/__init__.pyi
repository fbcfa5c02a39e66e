from .analyzers import hidden_rank as hidden_rank
from .analyzers import memories as memories
from .analyzers import neuron_clusters as neuron_clusters
from .analyzers import recall as recall
from .analyzers import weight_rank as weight_rank
from .corpus import load_corpus as load_corpus
from .corpus import load_dataset_corpus as load_dataset_corpus
from .corpus import pack as pack
from .ffn import FFN as FFN
from .models import check_model as check_model
from .models import context_length as context_length
from .models import fetch as fetch
from .models import ffns as ffns
from .models import load_model as load_model
from .models import tokenizer_of as tokenizer_of
from .result import Result as Result
from .statistics import CoActivation as CoActivation
from .statistics import Count as Count
from .statistics import FiringRate as FiringRate
from .statistics import Marginals as Marginals
from .statistics import Moments as Moments
from .statistics import SketchedMoments as SketchedMoments
from .statistics import TopActivations as TopActivations
from .stream import Probe as Probe
from .stream import capture as capture
from .stream import collect as collect

__version__: str
