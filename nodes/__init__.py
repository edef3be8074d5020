"""What a user sees: schemas, checks of arguments, one call below. One file per family, no maths."""

from . import demo, edit, invert, mask, self_attention, trajectory, view

NODES = [*invert.NODES, *trajectory.NODES, *edit.NODES, *self_attention.NODES, *mask.NODES, *view.NODES, *demo.NODES]
