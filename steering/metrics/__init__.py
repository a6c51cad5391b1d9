"""How far two sets of samples are apart, how much one set varies, and exact divergences.

All but the exact ones work on features that the caller extracted, and say with which extractor.
"""

from steering.metrics.diversity import Diversity, diversity
from steering.metrics.exact import kl, total_variation
from steering.metrics.extractors import Extractor, extractor
from steering.metrics.frechet import FEW, Frechet, Moments, frechet
from steering.metrics.manifold import Manifold, manifold
from steering.metrics.mmd import MMD, cmmd, kid, mmd, within
from steering.metrics.ngram import NGram

__all__ = [
    "FEW",
    "MMD",
    "Diversity",
    "Extractor",
    "Frechet",
    "Manifold",
    "Moments",
    "NGram",
    "cmmd",
    "diversity",
    "extractor",
    "frechet",
    "kid",
    "kl",
    "manifold",
    "mmd",
    "total_variation",
    "within",
]
