"""What is steered and by what: models, rewards, metrics and the built-in checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from steering.core import Model
from steering.guidance import (
    DPS,
    MPGD,
    ClassifierGuidance,
    FlowChef,
    FlowDPS,
    FreeDoM,
    Twist,
    jacobian_cosine,
)
from steering.pipelines import from_pipeline

if TYPE_CHECKING:
    from steering import cfg, editing, finetune, guidance, metrics, operators, rewards, zoo
    from steering.editing import FlowChefEdit, flow_edit
    from steering.pipelines.masked_lm import from_masked_lm
    from steering.pipelines.noprop import from_noprop
    from steering.pipelines.steered import steer
    from steering.rewards.measure import measure

__all__ = [
    "DPS",
    "MPGD",
    "ClassifierGuidance",
    "FlowChef",
    "FlowChefEdit",
    "FlowDPS",
    "FreeDoM",
    "Model",
    "Twist",
    "cfg",
    "editing",
    "finetune",
    "flow_edit",
    "from_masked_lm",
    "from_noprop",
    "from_pipeline",
    "guidance",
    "jacobian_cosine",
    "measure",
    "metrics",
    "operators",
    "rewards",
    "steer",
    "zoo",
]

# where those are that are no submodules
_FUNCTIONS = {
    "FlowChefEdit": "steering.editing",
    "flow_edit": "steering.editing",
    "from_masked_lm": "steering.pipelines.masked_lm",
    "from_noprop": "steering.pipelines.noprop",
    "measure": "steering.rewards.measure",
    "steer": "steering.pipelines.steered",
}


def __getattr__(name: str) -> Any:
    """Submodules are imported when first asked for: `import steering` needs torch alone."""
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return import_module(f"steering.{name}")
    raise AttributeError(f"module 'steering' has no attribute {name!r}; it has {__all__}.")
