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
from steering.metrics.sequences import (
    Motif,
    hamming_diversity,
    kmer_correlation,
    kmer_counts,
    motif_correlation,
    motif_hits,
    read_jaspar,
)

__all__ = [
    "FEW",
    "MMD",
    "Diversity",
    "Extractor",
    "Frechet",
    "Manifold",
    "Moments",
    "Motif",
    "NGram",
    "cmmd",
    "diversity",
    "extractor",
    "frechet",
    "hamming_diversity",
    "kid",
    "kl",
    "kmer_correlation",
    "kmer_counts",
    "manifold",
    "mmd",
    "motif_correlation",
    "motif_hits",
    "read_jaspar",
    "total_variation",
    "within",
]
