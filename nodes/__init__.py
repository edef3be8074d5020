"""What a user sees: schemas, checks of arguments, one call below. One file per family, no maths."""

from . import demo, edit, invert, mask, self_attention, tokens, trajectory, view

FAMILIES = (invert, trajectory, edit, self_attention, mask, tokens, view, demo)
NODES = [node for family in FAMILIES for node in family.NODES]
