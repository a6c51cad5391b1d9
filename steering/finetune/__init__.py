"""What changes a model's weights: tuning to a reward, and to draws that are given."""

from steering.finetune.distill import distill
from steering.finetune.drakes import drakes
from steering.finetune.loop import NotFiniteError, Tuned
from steering.finetune.path_kl import path_kl

__all__ = ["NotFiniteError", "Tuned", "distill", "drakes", "path_kl"]
