"""A picture's background, from its parts and from where its nouns look (Dynamic Prompt Learning, section 3.3).

Clusters of self-attention are the parts; one that no noun agrees with is background. torch only.
"""

import torch
from torch.nn import functional as F

from .self_maps import label_masks

NOBODY = -1


def agreement(maps, labels, grid, count):
    """How much each noun looks at each of ``count`` clusters: (W, V) in 0..1.

    ``maps`` (W, h, w) are the nouns' cross-attention, ``labels`` (N,) the clusters of the tokens on ``grid``. As the
    paper's code has it a map is lowered by its least value and divided by its greatest; then its mean over a cluster
    is taken. A flat map agrees with nothing.
    """
    maps = F.interpolate(maps[None].float(), grid, mode="nearest-exact")[0].flatten(1)
    maps = (maps - maps.amin(1, keepdim=True)) / maps.amax(1, keepdim=True).clamp(min=1e-12)
    member = F.one_hot(labels, count).to(maps)
    return maps @ member / member.sum(0).clamp(min=1)


def owners(scores, threshold):
    """Whose each cluster is, (V,): the noun that agrees with it most, or NOBODY's where none is above ``threshold``.
    And what is unusual about it, a sentence or "".

    Where no cluster is background, the one that the nouns agree with least becomes it; where all of them are, the nouns
    are given one each, best agreement first, and at least one stays background.
    """
    best, noun = scores.max(0)
    found = torch.where(best > threshold, noun, NOBODY)
    if (found == NOBODY).all():
        free = scores.clone()
        for _ in range(min(len(scores), len(found) - 1)):
            number, part = divmod(int(free.argmax()), len(found))
            found[part] = number
            free[number], free[:, part] = -1, -1
        return found, (
            f"No noun agrees with any part of the picture above {threshold:g}, so they were given the parts that they "
            "agree with most; lower the threshold."
        )
    if not (found == NOBODY).any():
        found[best.argmin()] = NOBODY
        return found, (
            f"The nouns agree with every part of the picture above {threshold:g}, so the part that they agree with "
            "least became the background; raise the threshold or the number of clusters."
        )
    return found, ""


def masks(labels, owners, count, grid, size):
    """MASKs (1 + count, H, W) of 0 and 1 at ``size``: the background's, then each noun's."""
    return label_masks(owners[labels] - NOBODY, 1 + count, grid, size)


def forbidden(background, own, words, pictures):
    """What each of ``words`` nouns must not look at, in 0..1: for each picture (W, N), or None where nothing says.

    On an attention grid of N tokens: ``background`` (B or 1, N), and ``own`` (W or B * W, N), the places of the nouns,
    picture after picture; either may be None. A noun keeps to its own place, or, where that is black, out of the
    background.
    """
    shared = (
        [None] * pictures if background is None else [row.expand(words, -1) for row in background.expand(pictures, -1)]
    )
    if own is None:
        return shared
    own = own.unflatten(0, (-1, words)).expand(pictures, -1, -1)
    return [
        torch.where((mine == 0).all(1, keepdim=True), torch.zeros_like(mine) if spare is None else spare, 1 - mine)
        for mine, spare in zip(own, shared, strict=True)
    ]
