"""Prompt-to-Prompt re-weighting: a word counts for more or for less, wherever it looks.

In the picture: what the word says grows stronger, fades at factors below 1, goes at 0 and turns into its opposite
below. It scales the columns of the cross-attention after the other edits and does not renormalise, as in the paper.
It costs nothing of its own.

Paper: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, section 3.2.
"""

from dataclasses import dataclass

from torch import Tensor

from .controller import Controller
from .values import Window


@dataclass(frozen=True, kw_only=True, eq=False)
class Reweight(Controller):
    """``factors`` (T,) multiply the target's columns inside the window ``cross``."""

    factors: Tensor
    cross: Window

    def edits(self, place):
        if place.kind != "cross" or not self.cross.contains(place.step, place.steps + 1):
            return False
        return bool((self.factors != 1).any())

    def cross_map(self, place, own, references):
        return own * self.factors.to(own)
