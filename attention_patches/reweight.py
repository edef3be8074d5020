"""Prompt-to-Prompt re-weighting: a word counts for more or for less, wherever it looks.

In the picture: what the word says grows stronger, fades at factors below 1, goes at 0 and turns into its opposite
below. It scales the columns of the cross-attention after the other edits and does not renormalise, as in the paper.
It costs nothing of its own.

Paper: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, section 3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .controller import Controller
from .values import Window


@dataclass(frozen=True, kw_only=True, eq=False)
class Reweight(Controller):
    """``factors`` (T,) multiply the target's columns inside the window ``cross``; those of a word in ``word_windows``,
    pairs of token positions and a :class:`Window`, inside its own, as the authors' code bounds them."""

    factors: Tensor
    cross: Window
    word_windows: tuple = ()

    def edits(self, place):
        return place.kind == "cross" and bool((self.factors_at(place.step, place.steps) != 1).any())

    def factors_at(self, step, steps):
        """The factors (T,) at the 0-based ``step`` of ``steps``, 1 where nothing is scaled."""
        # The reference code's table for the cross-attention has one row more than there are steps.
        acts = torch.full(self.factors.shape, self.cross.contains(step, steps + 1))
        for positions, window in self.word_windows:
            acts[list(positions)] = window.contains(step, steps + 1)
        return torch.where(acts, self.factors, 1.0)

    def cross_map(self, place, own, references):
        return own * self.factors_at(place.step, place.steps).to(own)
