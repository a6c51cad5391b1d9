"""Bending a model's steps towards a reward: one method per file."""

from steering.guidance.dps import DPS
from steering.guidance.flowchef import FlowChef
from steering.guidance.flowdps import FlowDPS
from steering.guidance.freedom import FreeDoM
from steering.guidance.mpgd import MPGD

__all__ = ["DPS", "MPGD", "FlowChef", "FlowDPS", "FreeDoM"]
