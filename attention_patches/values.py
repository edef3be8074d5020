"""The plain values that controllers are written in. torch only.

Letters in shapes: R rows (pictures times prompts), N picture tokens (h * w), T text tokens, H heads, C channels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class QKV(NamedTuple):
    """One attention layer's projected queries (R, N, C), keys and values (R, N or T, C), heads merged."""

    q: Tensor
    k: Tensor
    v: Tensor


def first_step(share, steps):
    """The 0-based step of ``steps`` from which on more than ``share`` of them is over: floor(share * steps)."""
    # A share such as 0.29 of 100 steps is 28.999... in floating point and must still mean step 29.
    return math.floor(share * steps + 1e-6)


@dataclass(frozen=True)
class Window:
    """A stretch of the sampling, as shares of the steps: 0 is the noisy start, 1 the finished picture.

    ``name`` is what the user knows it by. Raises ValueError for one that is reversed or reaches outside.
    """

    start: float
    end: float
    name: str = "The window"

    def __post_init__(self):
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"{self.name} is {self.start:g} to {self.end:g}, but it needs 0 <= start <= end <= 1 (start = end "
                "switches it off); change it on the Attune node."
            )

    def contains(self, step, steps):
        """Whether the 0-based ``step`` of ``steps`` lies inside; floor(start*steps) <= step < floor(end*steps)."""
        return first_step(self.start, steps) <= step < first_step(self.end, steps)


@dataclass(frozen=True)
class Place:
    """Where and when an attention layer is asked.

    ``kind`` is "self" or "cross"; ``block`` the host's name of the block, such as ("input", 4); ``depth`` the
    layer's number inside it; ``grid`` the picture's tokens (h, w); ``step`` the current one of ``steps``; ``number``
    counts the layers of this kind from 0 in the order that the UNet runs them. Of the rows that are asked about,
    ``pictures`` says which picture of the batch each draws, and ``negative`` whether they are guidance's other half.
    ``size`` is the whole picture's (H, W) in pixels, None where there is none.
    """

    kind: str
    block: tuple
    depth: int
    grid: tuple
    step: int
    steps: int
    number: int = 0
    pictures: tuple = (0,)
    negative: bool = False
    size: tuple | None = None

    @property
    def tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def layer(self):
        """What tells one layer of the UNet from another."""
        return self.kind, *self.block, self.depth


def split_heads(x, heads):
    """(R, N, H*D) to (R, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_map(q, k, heads):
    """Softmax probabilities (R, H, N, T) in fp32, whatever the model's precision."""
    q, k = split_heads(q, heads).float(), split_heads(k, heads).float()
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)


def apply_map(p, v, heads):
    """Attention output (R, N, C) of probabilities (R, H, N, T) and values (R, T, C), in the values' precision."""
    return (p.to(v.dtype) @ split_heads(v, heads)).transpose(1, 2).flatten(2)
