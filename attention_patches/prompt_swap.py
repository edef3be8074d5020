"""Prompt-to-Prompt word swap: the edit looks where the source looked, at another word.

In the picture: the named thing changes, layout and the rest stay. It acts in the cross-attention of every layer for
one stretch of the steps, and in the self-attention of the coarser layers for another. It costs one UNet row a step,
for the source. It cannot add, remove or move things.

Paper: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, section 3.2.
"""

from dataclasses import dataclass

from torch import Tensor

from .controller import Controller
from .values import QKV, Window


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSwap(Controller):
    """``mapper`` (T_source, T_target) carries the source's maps over, see :func:`words.swap_map`.

    ``cross`` and ``self_`` are the windows of the two injections; self-attention is replaced where the picture has at
    most ``token_limit`` tokens.
    """

    mapper: Tensor
    cross: Window
    self_: Window
    token_limit: int = 1024
    reference: str = "source"

    def active(self, step, steps):
        # The reference code's table for the cross-attention has one row more than there are steps.
        return self.cross.contains(step, steps + 1) or self.self_.contains(step, steps)

    def edits(self, place):
        if place.kind == "cross":
            return self.cross.contains(place.step, place.steps + 1)
        return place.tokens <= self.token_limit and self.self_.contains(place.step, place.steps)

    def self_attention(self, place, own, references):
        source = references[self.reference]
        return QKV(source.q, source.k, own.v)

    def cross_map(self, place, own, references):
        return references[self.reference] @ self.mapper.to(own)
