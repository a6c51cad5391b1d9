"""What is wanted of an item: one reward per file, and how rewards compose.

A reward is any callable `(items, prompts) -> [N]`, higher is better; what is here adds a name, says
whether it is differentiable, and composes: `0.7 * Classifier(net, [4]) + 0.3 * Jpeg()`.
"""

from steering.rewards.classifier import Classifier
from steering.rewards.compose import Minimum, Sum
from steering.rewards.jpeg import Jpeg
from steering.rewards.pil import FromPil, from_pil

__all__ = ["Classifier", "FromPil", "Jpeg", "Minimum", "Sum", "from_pil"]
