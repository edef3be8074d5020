"""What a user sees: schemas, checks of arguments, one call below. One file per family, no maths."""

from . import demo, edit, invert, trajectory, view

NODES = [*invert.NODES, *trajectory.NODES, *edit.NODES, *view.NODES, *demo.NODES]
