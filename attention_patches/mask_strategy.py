"""Mask strategies: one mask and a goal, as the masks and the choice that context-preserving edits take.

The section of the paper that lists them is lost; these follow from its equations and its figures.

Paper: "Rethinking Attentions in Zero-Shot Real Image Editing" (CPAM), section 3.5 and appendix A.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .maps import grown


class Strategy(NamedTuple):
    """``source`` and ``target`` masks (B, H, W) in 0..1, and whether the object is drawn from the source."""

    source: Tensor
    target: Tensor
    keep_object: bool


def _replace(mask, grow):
    return Strategy(grown(mask, grow), grown(mask, grow), False)


def _move(mask, grow):
    return Strategy(mask, grown(mask, grow), True)


def _inside(mask, grow):
    return Strategy(mask, mask, False)


def _remove(mask, grow):
    # No token is edited, so all of them read the background alone.
    return Strategy(grown(mask, grow), torch.zeros_like(mask), False)


def _background(mask, grow):
    # What surrounds the object is the thing that is edited; what is kept is the object.
    return Strategy(1 - mask, 1 - mask, False)


GOALS = {
    "replace object": (_replace, "Inside the mask the prompt is drawn; around it everything stays."),
    "change pose or view": (_move, "The object keeps its look and may take another form inside a loosened mask."),
    "edit inside": (_inside, "Inside the mask, just as it is painted, the prompt is drawn."),
    "add": (_inside, "Paint where the new thing is to stand; it is drawn there from the prompt."),
    "remove": (_remove, "Every place reads only what lies outside the mask, so the object goes."),
    "change background": (_background, "The mask covers what stays; the prompt is drawn around it."),
}


def strategy(mask, goal, grow):
    """The :class:`Strategy` for a goal of :data:`GOALS`; ``mask`` (B, H, W) in 0..1 covers the object, or for "edit
    inside" and "add" the region. ``grow`` is by how many pixels it is loosened where the goal wants it loose.
    """
    return GOALS[goal][0](mask, grow)
