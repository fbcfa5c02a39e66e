"""One mergeable statistic a file."""

from .base import IN_CACHE as IN_CACHE
from .base import Statistic as Statistic
from .co_activation import CoActivation as CoActivation
from .co_activation import CoActive as CoActive
from .count import Count as Count
from .cross_moments import Cross as Cross
from .cross_moments import CrossMoments as CrossMoments
from .cross_moments import QuadraticMoments as QuadraticMoments
from .firing_by_position import ByPosition as ByPosition
from .firing_by_position import FiringByPosition as FiringByPosition
from .firing_rate import FiringRate as FiringRate
from .magnitudes import Magnitude as Magnitude
from .magnitudes import Magnitudes as Magnitudes
from .marginals import Marginal as Marginal
from .marginals import Marginals as Marginals
from .moments import Covariance as Covariance
from .moments import Moments as Moments
from .partial_spectrum import Spectrum as Spectrum
from .sample import Drawn as Drawn
from .sample import Sample as Sample
from .sketched_moments import SketchedCovariance as SketchedCovariance
from .sketched_moments import SketchedMoments as SketchedMoments
from .top_activations import Top as Top
from .top_activations import TopActivations as TopActivations
