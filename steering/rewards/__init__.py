"""What is wanted of an item: one reward per file, and how rewards compose.

A reward is any callable `(items, prompts) -> [N]`, higher is better; what is here adds a name, says
whether it is differentiable, and composes: `0.7 * Classifier(net, [4]) + 0.3 * Jpeg()`. Its `card`
has the facts: range, memory, revision of the weights, licence, paper. Learned ones load their
weights at the first call.
"""

from steering.rewards.acceptability import Acceptability
from steering.rewards.additive import Additive
from steering.rewards.aesthetic import Aesthetic
from steering.rewards.card import Card
from steering.rewards.classifier import Classifier
from steering.rewards.clip_score import ClipScore
from steering.rewards.compose import Minimum, Product, Standardized, Sum
from steering.rewards.frames import OverFrames
from steering.rewards.imscore import Imscore
from steering.rewards.jpeg import Jpeg
from steering.rewards.judge import Judge
from steering.rewards.log_odds import LogOdds
from steering.rewards.measure import Measure
from steering.rewards.pick_score import PickScore
from steering.rewards.pil import FromPil, from_pil
from steering.rewards.table import Table
from steering.rewards.text import FromText, from_text

__all__ = [
    "Acceptability",
    "Additive",
    "Aesthetic",
    "Card",
    "Classifier",
    "ClipScore",
    "FromPil",
    "FromText",
    "Imscore",
    "Jpeg",
    "Judge",
    "LogOdds",
    "Measure",
    "Minimum",
    "OverFrames",
    "PickScore",
    "Product",
    "Standardized",
    "Sum",
    "Table",
    "from_pil",
    "from_text",
]
