"""Prompt-to-Prompt: the edit looks where the source looked, at another word (swap) or at more words (refinement).

In the picture: the named thing changes, layout and the rest stay. It acts in the cross-attention of every layer for
one stretch of the steps, and in the self-attention of the coarser layers for another. It costs one UNet row a step,
for the source. It cannot move things. Swap and refinement differ only in the map from the source's words to the
target's, which :mod:`alignment` makes.

Paper: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, section 3.2.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .controller import Controller
from .values import QKV, Window


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptToPrompt(Controller):
    """``mapper`` (T_source, T_target) carries the source's maps over; the target's columns that ``injected``
    (T_target,) bool leaves out keep the target's own.

    ``cross`` and ``self_`` are the windows of the two injections; ``word_windows``, pairs of (positions, window), take
    the place of ``cross`` at some of the columns. Cross-attention is replaced in ``cross_layers``, counted from 0, None
    for all; self-attention in ``self_layers``, or where those are None in the layers of at most ``token_limit`` picture
    tokens.
    """

    replaces_words = True

    mapper: Tensor
    injected: Tensor
    cross: Window
    self_: Window
    word_windows: tuple = ()
    token_limit: int = 1024
    cross_layers: frozenset | None = None
    self_layers: frozenset | None = None
    reference: str = "source"

    @property
    def reads(self):
        return (self.reference,)

    def edits(self, place):
        if place.kind == "cross":
            there = self.cross_layers is None or place.number in self.cross_layers
            return there and self._carries(place.step, place.steps)
        there = place.tokens <= self.token_limit if self.self_layers is None else place.number in self.self_layers
        return there and self.self_.contains(place.step, place.steps)

    def _carries(self, step, steps):
        # The reference code's table for the cross-attention has one row more than there are steps.
        return any(window.contains(step, steps + 1) for window in (self.cross, *(w for _, w in self.word_windows)))

    def columns(self, step, steps):
        """The columns (T_target,) bool that come from the source at the 0-based ``step`` of ``steps``."""
        columns = torch.full_like(self.injected, self.cross.contains(step, steps + 1))
        for positions, window in self.word_windows:
            columns[list(positions)] = window.contains(step, steps + 1)
        return columns & self.injected

    def reads_own_map(self, place):
        return not self.columns(place.step, place.steps).all()

    def self_attention(self, place, own, references):
        source = references[self.reference]
        return QKV(source.q, source.k, own.v)

    def cross_map(self, place, own, references):
        source = references[self.reference]
        carried = source if self._straight else source @ self.mapper.to(source)
        if own is None:
            return carried
        return torch.where(self.columns(place.step, place.steps).to(own.device), carried, own)

    @functools.cached_property
    def _straight(self):
        return torch.equal(self.mapper, torch.eye(*self.mapper.shape))
