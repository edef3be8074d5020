"""Attention maps as pictures: gathering the cross-attention of a run, and reading one word's map out of it.

Maps are averaged over heads, layers and steps at one level of the UNet, as in Prompt-to-Prompt's figures.
"""

import torch

from .values import attention_map


class MapSum:
    """Adds up the cross-attention maps of a run: feed it every call; it keeps one sum (B, h, w, T) a grid."""

    def __init__(self):
        self.sums = {}

    def add(self, place, own, heads):
        p = attention_map(own.q, own.k, heads).mean(1).unflatten(1, place.grid).cpu()
        total, count = self.sums.get(place.grid, (0, 0))
        self.sums[place.grid] = (total + p, count + 1)

    def nearest(self, tokens):
        """The average map (B, h, w, T) of the level nearest to ``tokens`` picture tokens, on a log scale."""
        grid = min(self.sums, key=lambda g: abs(torch.tensor(g[0] * g[1] / tokens).log()))
        total, count = self.sums[grid]
        return total / count


def word_map(maps, positions):
    """The map (B, h, w) of one word: the sum over its token positions of (B, h, w, T)."""
    return maps[..., list(positions)].sum(-1)


def stretch(maps):
    """Each of (B, h, w) scaled to 0..1 by its own least and greatest value; a flat map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-8)
