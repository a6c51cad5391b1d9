"""Static pictures for files and notebooks, drawn with Pillow alone."""

from samplers.view.curve import curve
from samplers.view.grid import image_grid
from samplers.view.tree import tree_picture

__all__ = ["curve", "image_grid", "tree_picture"]
