"""Proximal guidance: of what the prompt adds to the negative, only the strong part is followed.

In the picture: guidance pulls at every place a little, and over the steps that little redraws the background. Where the
pull is weak it is dropped, so that the rest of the picture stays as the negative alone draws it.

Paper: Han et al., "ProxEdit: Improving Tuning-Free Real Image Editing with Proximal Guidance", arXiv 2306.05414: the
proximal operators of the l1 and the l0 norm, with a quantile of the difference's size as threshold.
"""

from torch import Tensor, quantile, where

SOFT, HARD = "soft (l1)", "hard (l0)"
RULES = (SOFT, HARD)


def proximal(difference: Tensor, share: float, rule: str) -> Tensor:
    """What of ``difference`` (B, ...), of the guided and the unguided prediction, is followed: the same shape.

    The threshold is the quantile ``share`` in 0..1 of the absolute values, of each picture by itself. Below it all is
    0. Above it :data:`HARD` keeps a value as it is, :data:`SOFT` brings it nearer to 0 by the threshold.

    As both follow the difference's scale, it may be one of noise or one of clean pictures.
    """
    size = difference.abs()
    # In fp32, the least that a quantile is computed in.
    limit = quantile(size.flatten(1).float(), share, dim=1).to(size)
    limit = limit.reshape(-1, *[1] * (difference.dim() - 1))
    if rule == HARD:
        return where(size > limit, difference, 0)
    return difference.sign() * (size - limit).clamp(min=0)
