"""Says what a picture of the demo world shows: its background, and each object's colour and shape.

It knows the world's rules and nothing of any model: colours are told by the nearest palette colour of each pixel,
shapes by the best of a set of templates laid over the object's outline. On true renders it is right in over 98 %
(``dev.py score checker`` prints the share).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from . import scenes

STANDS_OUT = 0.2  # RGB distance from the background at which a pixel belongs to an object
LEAST_AREA = 0.005  # share of the picture below which something is a speck and no object
GRID = 48  # side of the grid on which outlines are compared


@dataclass(frozen=True)
class Found:
    """One object: its names, and its mask (H, W) bool."""

    color: str
    shape: str
    mask: np.ndarray


def nearest_color(pixels, names=scenes.COLORS):
    """For (N, 3) pixels in 0..1, the number in ``names`` of the nearest palette colour."""
    distances = [np.linalg.norm(pixels[:, None] - scenes.ANCHORS[n][None], axis=-1).min(1) for n in names]
    return np.argmin(distances, 0)


def color_of(pixels, names=scenes.COLORS):
    """The palette colour that most of (N, 3) pixels are nearest to."""
    return names[np.bincount(nearest_color(pixels, names), minlength=len(names)).argmax()]


def _background(picture):
    """The background as a plane through each channel (H, W, 3): light may fall off across the picture."""
    h, w, _ = picture.shape
    y, x = np.mgrid[0:h, 0:w]
    edge = (x < 3) | (y < 3) | (x >= w - 3) | (y >= h - 3)
    middle = np.median(picture[edge], axis=0)
    calm = np.linalg.norm(picture - middle, axis=-1) < STANDS_OUT
    basis = np.stack([np.ones(h * w), x.ravel() / w, y.ravel() / h], 1)
    plane = np.linalg.lstsq(basis[calm.ravel()], picture[calm], rcond=None)[0]
    return (basis @ plane).reshape(h, w, 3), middle


def _outline(mask):
    """A mask moved to its centre and scaled to one area, on a small grid; None for a mask with no pixels."""
    y, x = np.nonzero(mask)
    if not len(y):
        return None
    step = math.sqrt(len(y)) * 2.4 / GRID
    rows = y.mean() + (np.arange(GRID) - GRID / 2 + 0.5) * step
    cols = x.mean() + (np.arange(GRID) - GRID / 2 + 0.5) * step
    return ndimage.map_coordinates(mask.astype(np.float32), np.meshgrid(rows, cols, indexing="ij"), order=1) > 0.5


@functools.cache
def _templates():
    angles = np.linspace(-0.3, 0.3, 9)
    found = []
    for shape in scenes.SHAPES:
        for angle in angles:
            item = scenes.thing(shape, "black", r=0.3, angle=float(angle))
            found.append((shape, _outline(scenes.render(scenes.scene("white", item))[1][0] > 0.5)))
    return found


def shape_of(mask):
    """The shape whose template covers a mask (H, W) bool best, whatever its place, size and slight turn."""
    outline = _outline(mask)
    scores = {}
    for shape, template in _templates():
        overlap = (outline & template).sum() / max(1, (outline | template).sum())
        scores[shape] = max(scores.get(shape, 0), overlap)
    return max(scores, key=scores.get)


def look(picture):
    """What a picture (H, W, 3) in 0..1 shows: the background's colour, and a :class:`Found` for each object."""
    plane, middle = _background(picture)
    stands = np.linalg.norm(picture - plane, axis=-1) > STANDS_OUT
    # Stripes and dots may come near the background's colour; closing keeps such an object in one piece.
    padded = np.pad(stands, 4)
    joined = ndimage.binary_closing(padded, ndimage.generate_binary_structure(2, 1), 2)[4:-4, 4:-4]
    labels, count = ndimage.label(joined, np.ones((3, 3)))
    found = []
    for number in range(1, count + 1):
        mask = labels == number
        if mask.mean() < LEAST_AREA:
            continue
        inside = ndimage.binary_erosion(mask, iterations=2)
        pixels = picture[inside if inside.sum() > 20 else mask]
        found.append(Found(color_of(pixels), shape_of(mask), mask))
    return color_of(middle[None], scenes.BACKGROUNDS), found


def grade(picture, source):
    """Whether a picture shows a scene: colours, shapes, background right, nothing surplus, and all of these.

    Colours are right when each asked-for colour stands on some object; shapes when each asked-for colour and shape
    stand on the same one.
    """
    background, found = look(picture)
    seen = [(f.color, f.shape) for f in found]
    asked = [(t.color, t.shape) for t in source.things]
    marks = {
        "colours": all(c in [s[0] for s in seen] for c, _ in asked),
        "shapes": all(a in seen for a in asked),
        "background": background == source.background,
        "nothing surplus": len(seen) <= len(asked),
    }
    return marks | {"everything": all(marks.values())}
