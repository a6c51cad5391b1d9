"""How far two sets of samples are apart, and how much one set varies.

All of them work on features that the caller extracted, and say with which extractor.
"""

from steering.metrics.diversity import Diversity, diversity
from steering.metrics.frechet import Frechet, Moments, frechet
from steering.metrics.mmd import MMD, mmd

__all__ = ["MMD", "Diversity", "Frechet", "Moments", "diversity", "frechet", "mmd"]
