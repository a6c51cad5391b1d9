"""Chains whose law is known in closed form, to hold samplers against."""

from tests.exact.finite import FiniteChain, finite_chain
from tests.exact.gaussian import GaussianChain, gaussian_chain, tilted
from tests.exact.mixture import Checkerboard, Modes, diffusion_levels, planar_chain

__all__ = [
    "Checkerboard",
    "FiniteChain",
    "GaussianChain",
    "Modes",
    "diffusion_levels",
    "finite_chain",
    "gaussian_chain",
    "planar_chain",
    "tilted",
]
