"""How to steer: one paper per file, and the loop that runs them."""

from samplers.advise import Advice, advise
from samplers.ancestral import Ancestral
from samplers.beam import Beam
from samplers.best_of_n import BestOfN
from samplers.core import Budget, Draws, Plan, Purse, Rollouts, Sampler, Walked
from samplers.das import DAS
from samplers.importance import Importance
from samplers.journal import CorruptRecordError
from samplers.result import Result
from samplers.run import load, sample
from samplers.smc import SMC
from samplers.svdd import SVDD
from samplers.sweep import Sweep
from samplers.tds import TDS
from samplers.tree_sampling import TreeSampling
from samplers.tree_search import TreeSearch
from samplers.zero_order import ZeroOrder
from search.widen import Widening

__all__ = [
    "DAS",
    "SMC",
    "SVDD",
    "TDS",
    "Advice",
    "Ancestral",
    "Beam",
    "BestOfN",
    "Budget",
    "CorruptRecordError",
    "Draws",
    "Importance",
    "Plan",
    "Purse",
    "Result",
    "Rollouts",
    "Sampler",
    "Sweep",
    "TreeSampling",
    "TreeSearch",
    "Walked",
    "Widening",
    "ZeroOrder",
    "advise",
    "load",
    "sample",
]
