"""Bending a model's steps towards a reward: one method per file."""

from steering.guidance.classifier import ClassifierGuidance
from steering.guidance.diagnose import jacobian_cosine
from steering.guidance.dps import DPS
from steering.guidance.flowchef import FlowChef
from steering.guidance.flowdps import FlowDPS
from steering.guidance.freedom import FreeDoM
from steering.guidance.mpgd import MPGD
from steering.guidance.twist import Twist

__all__ = [
    "DPS",
    "MPGD",
    "ClassifierGuidance",
    "FlowChef",
    "FlowDPS",
    "FreeDoM",
    "Twist",
    "jacobian_cosine",
]
