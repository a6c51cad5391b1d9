"""Bending a model's steps towards a reward: one method per file."""

from steering.guidance.flowchef import FlowChef

__all__ = ["FlowChef"]
