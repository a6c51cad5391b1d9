"""Chains whose law is known in closed form, to hold samplers against."""

from tests.exact.finite import FiniteChain, finite_chain
from tests.exact.gaussian import (
    GaussianChain,
    NoisyClassifier,
    diffusion_levels,
    gaussian_chain,
    tilted,
)
from tests.exact.mixture import Checkerboard, Modes, mmd, planar_chain

__all__ = [
    "Checkerboard",
    "FiniteChain",
    "GaussianChain",
    "Modes",
    "NoisyClassifier",
    "diffusion_levels",
    "finite_chain",
    "gaussian_chain",
    "mmd",
    "planar_chain",
    "tilted",
]
