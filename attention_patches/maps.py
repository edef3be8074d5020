"""Attention maps as values: gathering the cross-attention of a run word by word, and making a mask of a word's map.

Maps are averaged over heads, and over layers and steps as the user asks. Prompt-to-Prompt's figures are the average of
every layer and step at 16x16.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .values import attention_map

PIECE = 1 << 23  # probabilities computed at a time: 32 MB in fp32

NEAREST, EACH = "level nearest to tokens", "each layer"
GROUPS = {"input": "down", "middle": "middle", "output": "up"}  # the host's name of a block's part, and the field's
CHOICES = (NEAREST, *GROUPS.values(), EACH)


@dataclass(frozen=True, eq=False)
class WordMaps:
    """Cross-attention maps: W words, L layers or averages of layers, S steps or averages of steps.

    ``words`` are W texts, ``layers`` L names such as "16x16, 5 layers" or "12 up 16x16" (the layer's number in the
    order in which the UNet runs). ``steps`` holds S tuples of 0-based steps out of ``total``, those that were averaged.
    ``maps`` are L tensors (W, S, B, h, w), fp32 on the CPU: the probability, 0 to 1, with which a picture token reads
    the word, summed over the word's tokens. Each layer has its own h and w.
    """

    words: tuple
    layers: tuple
    steps: tuple
    total: int
    maps: tuple


class MapSum:
    """Adds up the cross-attention of a run: feed :meth:`add` every call, and count ``step`` on to tell steps apart.

    ``positions`` holds, for each of W words, its token positions. What is kept is a sum (W, B, h, w) a layer and step.
    """

    def __init__(self, positions):
        self.positions = positions
        self.step = 0
        self.sums = {}  # (layer, grid), in the order of the UNet -> step -> (sum, count)

    def add(self, place, own, heads):
        pieces = [
            torch.stack([p[..., list(w)].sum(-1) for w in self.positions]).cpu() for *_, p in pieces_of(own, heads)
        ]
        words = torch.cat(pieces, 1).unflatten(1, (len(own.q), *place.grid))
        steps = self.sums.setdefault((place.layer, place.grid), {})
        total, count = steps.get(self.step, (0, 0))
        steps[self.step] = (total + words, count + 1)

    @property
    def layers(self):
        """(layer, grid) of every layer in the order in which the UNet runs. Raises ValueError where there is none.

        A pack that shrinks the picture in the first steps gives a layer two sizes; the one of more steps counts.
        """
        most = {}
        for (layer, grid), steps in self.sums.items():
            if layer not in most or len(steps) >= len(self.sums[layer, most[layer]]):
                most[layer] = grid
        return _any(list(most.items()))

    def choose(self, choice, tokens):
        """The layers that a choice of :data:`CHOICES` or a number means: a list of (name, list of (layer, grid)).

        A number counts layers from 0; ``tokens`` names the level where a choice leaves it open. Raises ValueError for
        a number or a group that the model has no layer for.
        """
        layers = self.layers
        names = [f"{i} {GROUPS[layer[1]]} {_size(grid)}" for i, (layer, grid) in enumerate(layers)]
        if isinstance(choice, int):
            if choice >= len(layers):
                raise ValueError(
                    f"The layer is {choice}, but the MODEL has {len(layers)} layers of cross-attention, 0 to "
                    f"{len(layers) - 1}; choose one of these in Attune Attention Maps."
                )
            return [(names[choice], [layers[choice]])]
        if choice == EACH:
            return [(name, [layer]) for name, layer in zip(names, layers, strict=True)]
        group = [entry for entry in layers if choice in (NEAREST, GROUPS[entry[0][1]])]
        if not group:
            raise ValueError(
                f'The MODEL has no cross-attention in its part "{choice}"; choose others in Attune Attention Maps.'
            )
        grid = nearest({g for _, g in group}, tokens)
        chosen = [entry for entry in group if entry[1] == grid]
        part = "" if choice == NEAREST else choice + " "
        return [(f"{part}{_size(grid)}, {len(chosen)} layer{'s' * (len(chosen) > 1)}", chosen)]

    def average(self, layers, steps=None):
        """The mean map (W, B, h, w) of layers of one size, over all steps or those named."""
        found = [
            entry for layer in layers for step, entry in self.sums[layer].items() if steps is None or step in steps
        ]
        return sum(total for total, _ in found) / sum(count for _, count in found)

    def level(self, tokens):
        """The mean map (W, B, h, w) of the level nearest to ``tokens``, over all layers and steps."""
        ((_, layers),) = self.choose(NEAREST, tokens)
        return self.average(layers)

    def collect(self, words, choice, tokens, each_step, total):
        """The :class:`WordMaps` of a run of ``total`` steps, for a choice as in :meth:`choose`."""
        chosen = self.choose(choice, tokens)
        # Of a layer with two sizes only some steps are there.
        seen = sorted(set.intersection(*(set().union(*(self.sums[x] for x in layers)) for _, layers in chosen)))
        steps = tuple((s,) for s in seen) if each_step else (tuple(seen),)
        maps = tuple(torch.stack([self.average(layers, at) for at in steps], 1) for _, layers in chosen)
        return WordMaps(tuple(words), tuple(name for name, _ in chosen), steps, total, maps)


def beside(found, other, which, name):
    """A :class:`WordMaps` in which ``other``'s word, under ``name``, follows each whose number is in ``which``."""
    order = [pair for i in range(len(found.words)) for pair in [(found, i)] + [(other, i)] * (i in which)]
    words = tuple(one.words[i] if one is found else f"{one.words[i]}, {name}" for one, i in order)
    layers = range(len(found.maps))
    mixed = tuple(torch.stack([one.maps[layer][i] for one, i in order]) for layer in layers)
    return replace(found, words=words, maps=mixed)


def _size(grid):
    return f"{grid[1]}x{grid[0]}"


def _any(found):
    if not found:
        raise ValueError(
            "No attention layer of the MODEL lines up with the picture, since a pack's patch on it changes the tokens; "
            "connect the MODEL from before that pack's node."
        )
    return found


def nearest(grids, tokens):
    """The grid (h, w) whose number of tokens is nearest to ``tokens`` on a log scale; the larger of two as near.

    Raises ValueError where there are none.
    """
    return min(sorted(_any(set(grids)), reverse=True), key=lambda g: abs(math.log(g[0] * g[1] / tokens)))


def pieces_of(own, heads):
    """The maps of a call, averaged over heads, in pieces: (row, slice of n queries, map (n, T) in fp32)."""
    size = max(1, PIECE // (heads * own.k.shape[1]))
    for row in range(len(own.q)):
        for first in range(0, own.q.shape[1], size):
            at = slice(first, first + size)
            yield row, at, attention_map(own.q[row : row + 1, at], own.k[row : row + 1], heads)[0].mean(0)


def noised(clean, noise, sigmas):
    """What the network is shown of a finished picture: clean (B, C, h, w) + sigma * noise, (S+1, B, C, h, w)."""
    return clean + sigmas.view(-1, 1, 1, 1, 1).to(clean) * noise.to(clean)


# ---- masks -------------------------------------------------------------------------------------------------------


def stretch(maps):
    """Each of (B, h, w) scaled to 0..1 by its own least and greatest value; a flat map becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # What rounding alone makes different is flat too.
    return (maps - low) / (high - low).clamp(min=1e-8) * (high - low > 1e-5 * high)


def mask_of(found, word, size, threshold, grow, feather):
    """One word's MASK (B, H, W) in 0..1: the mean over all layers and steps of a :class:`WordMaps`, stretched.

    ``word`` is its number; ``size`` is (H, W) in pixels. ``threshold`` 0 keeps the map soft, above 0 the mask is 1
    where the stretched map reaches it and 0 elsewhere. ``grow`` (pixels, negative shrinks) and ``feather`` (pixels)
    come after.
    """
    mask = stretch(sum(resize(m[word].mean(0), size) for m in found.maps))
    if threshold > 0:
        mask = (mask >= threshold).float()
    return feathered(grown(mask, grow), feather)


def resize(maps, size):
    """Maps (B, h, w) at ``size`` (H, W): bilinear, and averaged over what a pixel covers where they get smaller."""
    return F.interpolate(maps[:, None], size, mode="bilinear", antialias=True)[:, 0]


def grown(mask, pixels):
    """A mask (B, H, W) that reaches ``pixels`` further in every direction, or less far where negative.

    The shape is an octagon: steps to the four neighbours and to all eight by turns come near to a circle.
    """
    if pixels < 0:
        return -grown(-mask, -pixels)
    # Steps commute, so those to all eight are one large square.
    square = pixels // 2
    for _ in range(pixels - square):
        across, along = F.max_pool2d(mask, (1, 3), 1, (0, 1)), F.max_pool2d(mask, (3, 1), 1, (1, 0))
        mask = torch.maximum(across, along)
    mask = F.max_pool2d(mask, (1, 2 * square + 1), 1, (0, square))
    return F.max_pool2d(mask, (2 * square + 1, 1), 1, (square, 0))


def feathered(mask, pixels):
    """A mask (B, H, W) whose edge is blurred over about ``pixels`` to either side: a Gaussian of half as many."""
    if pixels <= 0:
        return mask
    sigma = pixels / 2
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=mask.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(mask)
    padded = F.pad(mask[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0].clamp(0, 1)
