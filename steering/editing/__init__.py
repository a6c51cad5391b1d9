"""Editing images that are there: with a mask of what to keep, and without one."""

from steering.editing.flow_edit import flow_edit
from steering.editing.masked import PUBLISHED, FlowChefEdit

__all__ = ["PUBLISHED", "FlowChefEdit", "flow_edit"]
