"""Random-weight pipelines of many families, built in memory: `families()` lists them."""

import importlib

from tests.tiny.parts import Tiny

GROUPS = (
    "stable_diffusion",
    "stable_diffusion_3",
    "flux",
    "image_flows",
    "image_flows_recent",
    "cross_attention",
    "pixels_and_classes",
    "video",
    "video_diffusion",
    "from_image",
)


def families() -> list[Tiny]:
    """Every pipeline; nothing is built until `Tiny.build()`."""
    groups = [importlib.import_module(f"tests.tiny.{group}") for group in GROUPS]
    return [tiny for group in groups for tiny in group.families()]
