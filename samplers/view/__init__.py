"""Pictures for files and notebooks, drawn with Pillow (plots of sweeps with matplotlib), and a page
to look into a tree.
"""

from samplers.view.curve import curve
from samplers.view.grid import image_grid
from samplers.view.page import tree_page
from samplers.view.plot import plot
from samplers.view.strip import strip
from samplers.view.tree import tree_picture

__all__ = ["curve", "image_grid", "plot", "strip", "tree_page", "tree_picture"]
