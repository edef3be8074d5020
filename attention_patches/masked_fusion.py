"""Masked fusion: inside a mask the new picture is put together as an intermediate picture is, outside it is the source.

In the picture: where the mask is black, the source comes back, by its own text and its own self-attention; where it is
white, an intermediate picture that a sketch led says which places belong together, and the target's prompt what they
show. Both are predicted for the whole picture and each latent pixel takes one of them, so the border is drawn and not
cut. It costs four UNet rows a step beside the two of each picture that is read.

Paper: Li et al., "Enhancing Text-to-Image Editing via Hybrid Mask-Informed Fusion" (MaSaFusion), equations 9, 10 and
14, algorithms 1 and 5.
"""

from dataclasses import dataclass

import torch

from .controller import Controller
from .masks import HALF, touched
from .values import QKV, Window

OUTSIDE, INSIDE = "outside the mask", "inside the mask"  # the parts' names
SOURCE, SOURCE_NEGATIVE = "source", "source, negative"
INTERMEDIATE, INTERMEDIATE_NEGATIVE = "intermediate", "intermediate, negative"
SOURCES, OWN = "source's", "own"  # whose queries read the source outside the mask
GAUSSIAN, INVERTED, MIXED = "gaussian", "source's", "source's outside, gaussian inside"


@dataclass(frozen=True, kw_only=True, eq=False)
class _PartOfPicture(Controller):
    """Inside ``window``, from the self-attention ``layer`` on, counted from 0; ``prompt`` is the part's name."""

    both_halves = True
    is_part = True

    window: Window
    layer: int
    reads = ()

    def edits(self, place):
        inside = self.window.contains(place.step, place.steps)
        return place.kind == "self" and place.number >= self.layer and inside


@dataclass(frozen=True, kw_only=True, eq=False)
class LikeSource(_PartOfPicture):
    """Attention(Q source, K source, V source), each half of guidance by itself: the prediction outside the mask of
    equations 9, 10 and 14."""

    reads = SOURCE, SOURCE_NEGATIVE

    def self_attention(self, place, own, references):
        return references[SOURCE_NEGATIVE if place.negative else SOURCE]


@dataclass(frozen=True, kw_only=True, eq=False)
class FromSource(_PartOfPicture):
    """Attention(Q target, K source, V source), each half of guidance by itself: equation 13, and in place of equation
    9's outside the reading that leaves each latent pixel its own queries."""

    reads = SOURCE, SOURCE_NEGATIVE

    def self_attention(self, place, own, references):
        source = references[SOURCE_NEGATIVE if place.negative else SOURCE]
        return QKV(own.q, source.k, source.v)


@dataclass(frozen=True, kw_only=True, eq=False)
class LikeIntermediate(_PartOfPicture):
    """Attention(Q intermediate, K intermediate, V target), each half by itself: equation 10's prediction inside."""

    reads = INTERMEDIATE, INTERMEDIATE_NEGATIVE

    def self_attention(self, place, own, references):
        read = references[INTERMEDIATE_NEGATIVE if place.negative else INTERMEDIATE]
        return QKV(read.q, read.k, own.v)


OUTSIDES = {SOURCES: LikeSource, OWN: FromSource}


def region(mask, size):
    """The latent pixels (B, h, w), 0 or 1, of ``size`` (h, w) that a mask (B, H, W) in 0..1 has white in."""
    return (touched(mask, size) >= HALF).float().unflatten(1, size)


def start_noise(kind, gaussian, source, inside):
    """Where drawing starts, (B, C, h, w): ``gaussian`` noise, the ``source``'s own, or each on its side of the region
    ``inside`` (B or 1, h, w). Figure 4 of the paper compares the three."""
    if kind == MIXED:
        return torch.where(inside[:, None] > 0, gaussian, source)
    return {GAUSSIAN: gaussian, INVERTED: source}[kind]
