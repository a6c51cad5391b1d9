"""What is steered and by what: models, rewards, metrics and the built-in checkpoints."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from steering.core import Model
from steering.guidance import FlowChef
from steering.pipelines import from_pipeline

if TYPE_CHECKING:
    from steering import cfg, guidance, metrics, rewards, zoo

__all__ = ["FlowChef", "Model", "cfg", "from_pipeline", "guidance", "metrics", "rewards", "zoo"]


def __getattr__(name: str) -> ModuleType:
    """Submodules are imported when first asked for: `import steering` needs torch alone."""
    if name in __all__:
        return import_module(f"steering.{name}")
    raise AttributeError(f"module 'steering' has no attribute {name!r}; it has {__all__}.")
