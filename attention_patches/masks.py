"""Masks where attention lives: on grids of picture tokens, and attention that only parts of a picture take part in.

A token takes the greatest value that the mask has anywhere in it. So a mask of any size lies on any grid to within a
token, thin ones are still there at the coarsest level, and soft edges stay soft. torch only.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .values import QKV

PIXELS = 8  # of a picture to a latent's one, each way, in every Stable Diffusion
FEW = 256  # tokens
HALF = 0.5  # a soft mask's token counts as the object's from here on


def fitted(mask, size):
    """A mask (..., H, W) of the picture that a VAE cut to ``size`` (H, W) in pixels, cut to it likewise; or one of what
    a VAE cuts from a picture of ``size``, with nothing around it. A mask of any other size comes back as it is.

    VAEs cut a picture about its middle to multiples of 8, so such a mask lies exactly, where scaling would shift it.
    """
    ours, theirs = tuple(mask.shape[-2:]), tuple(size)
    if ours == theirs or theirs != _cut(ours) and ours != _cut(theirs):
        return mask
    # A padding below 0 takes away.
    spare = [want - have for have, want in zip(ours, theirs, strict=True)]
    before = [int(s / 2) for s in spare]  # towards 0, as a VAE leaves the odd one at the end
    (top, left), (bottom, right) = before, [s - b for s, b in zip(spare, before, strict=True)]
    return F.pad(mask, [left, right, top, bottom])


def _cut(size):
    return tuple(side // PIXELS * PIXELS for side in size)


def touched(mask, grid):
    """The greatest value of a mask (B, H, W) in 0..1 in each token of ``grid`` (h, w): (B, h * w), fp32 on the CPU."""
    # The pool's bins are exactly the pixels that a token overlaps, in either direction of scaling.
    return F.adaptive_max_pool2d(mask[:, None].float().cpu(), grid).flatten(1)


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask (B or 1, H, W) in 0..1, white where something is edited or lies, that knows itself on every grid."""

    pixels: Tensor
    _grids: dict = field(default_factory=dict, repr=False)

    def on(self, place):
        """Its values on the tokens of a :class:`Place`, (1, N) for all rows or (R, N) for each."""
        key = place.size, place.grid
        if key not in self._grids:
            pixels = self.pixels if place.size is None else fitted(self.pixels, place.size)
            self._grids[key] = touched(pixels, place.grid)
        found = self._grids[key]
        return found if len(found) == 1 else found[list(place.pictures)]

    @functools.cached_property
    def full(self):
        """Whether it is 1 everywhere."""
        return bool((self.pixels >= 1).all())


class Part(NamedTuple):
    """A share of an attention layer's output: how much of it each query takes, and what it reads.

    ``weight`` (R or 1, N) in 0..1; ``keys`` (R or 1, M) bool, the ones that are read, or None for all; ``read`` the
    :class:`QKV` whose k and v (R, M, C) those are.
    """

    weight: Tensor
    keys: Tensor | None
    read: QKV


def attend_parts(attend, own, parts):
    """The sum of the parts' attentions of the queries ``own.q`` (R, N, C), each weighed: (R, N, C).

    ``attend(q, k, v)`` is the attention; on large grids only the queries that take part go through it, so two halves
    cost less than one whole. Where a part has no key to read, plain attention to ``own`` takes its place.
    """
    alike = all(len(p.weight) == 1 and (p.keys is None or len(p.keys) == 1) for p in parts)
    groups = [slice(None)] if alike else [slice(row, row + 1) for row in range(len(own.q))]
    out = torch.zeros_like(own.q)
    for rows in groups:
        for part in parts:
            weight = _row(part.weight, rows)
            if not weight.any():
                continue
            # Picking out a few costs more than it saves.
            queries = _chosen(weight > 0) if len(weight) > FEW else None
            k, v = part.read.k[rows], part.read.v[rows]
            if part.keys is not None:
                keys = _chosen(_row(part.keys, rows))
                if keys is not None:
                    k, v = (k[:, keys], v[:, keys]) if len(keys) else (own.k[rows], own.v[rows])
            if queries is None:
                out[rows] += weight.to(out)[:, None] * attend(own.q[rows], k, v)
            else:
                out[rows, queries] += weight[queries].to(out)[:, None] * attend(own.q[rows][:, queries], k, v)
    return out


def _row(table, rows):
    return table[0] if len(table) == 1 else table[rows][0]


def _chosen(flags):
    """The numbers of the tokens that are True, or None for all of them."""
    return None if flags.all() else flags.nonzero()[:, 0]
