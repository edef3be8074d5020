"""What a user sees: schemas, checks of arguments, one call below. One file per family, no maths."""

from . import cache, demo, edit, fusion, guidance, invert, mask, self_attention, tokens, trajectory, view
from .door import guarded

FAMILIES = (invert, trajectory, edit, self_attention, fusion, guidance, cache, mask, tokens, view, demo)
NODES = [guarded(node) for family in FAMILIES for node in family.NODES]
