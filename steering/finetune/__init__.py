"""What changes a model's weights: tuning to a reward or to given draws, and learning by blocks."""

from steering.finetune.blocks import LocalityError, LocalRule, train_blocks
from steering.finetune.distill import distill
from steering.finetune.drakes import drakes
from steering.finetune.loop import NotFiniteError, Tuned
from steering.finetune.noise_blocks import noise_blocks
from steering.finetune.noprop import learn_embedding, noprop, prototypes
from steering.finetune.path_kl import path_kl

__all__ = [
    "LocalRule",
    "LocalityError",
    "NotFiniteError",
    "Tuned",
    "distill",
    "drakes",
    "learn_embedding",
    "noise_blocks",
    "noprop",
    "path_kl",
    "prototypes",
    "train_blocks",
]
