"""Local blend: the edit shows where its words look, and everywhere else the picture is the source to the last digit.

In the picture: what an edit spilled over the rest is taken back. The words' cross-attention, of the source and of the
target as edited, is added up over the steps; where it stands out, the edit stays. A mask may stand in for the words.
After a first-order step the latent outside lies on the source's trajectory exactly.

Paper: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", arXiv 2208.01626, section 3.2, in
the form of the authors' code for null-text inversion: delayed start, words to keep the edit out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import PIXELS, fitted
from .values import first_step
from .watch import Watch, WatchedWords


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalBlend:
    """Keeps the edit of ``prompt``, whose conditioning has ``tokens`` tokens, inside a mask.

    ``words`` make the mask, if any; ``mask`` (B or 1, H, W) in 0..1 bounds it, or stands alone. ``threshold`` is a
    share of the strongest attention, ``outside_threshold`` the one for words that keep the edit out (None for the
    same), ``start`` the share of the steps after which it acts, ``level`` the picture
    tokens of the attention level whose maps count (the nearest that the UNet has).
    """

    prompt: str
    tokens: int
    words: WatchedWords | None
    mask: Tensor | None = None
    threshold: float = 0.3
    start: float = 0.2
    level: int = 256
    reference: str = "source"
    outside_threshold: float | None = None

    def acts(self, step, steps):
        """Whether it blends at the 0-based ``step`` of ``steps``: from floor(start * steps) on."""
        return step >= first_step(self.start, steps) and self.start < 1

    @property
    def watch(self):
        """What it has to see of the words' maps, from the first step on; None for a blend by a mask."""
        return Watch(self.words, self.level, self.reference) if self.words is not None and self.start < 1 else None

    @property
    def reads(self):
        """The names of the references whose attention it looks at."""
        return () if self.watch is None else (self.reference,)

    @property
    def masks(self):
        return () if self.mask is None else (("mask of Attune Local Blend", self.mask),)

    def weight(self, maps, size):
        """How much of the edit stays, (B or 1, 1, H, W) in 0..1 at a latent's ``size`` (H, W); ``maps`` (4, B, h, w) as
        :meth:`WatchedWords.read` stacks them, summed over layers and steps, or None without words.
        """
        parts = []
        if self.mask is not None:
            mask = fitted(self.mask, [PIXELS * side for side in size])
            parts.append(F.adaptive_avg_pool2d(mask[:, None].float(), size))
        if maps is not None:
            maps = maps[:, :, None]
            # Without words to keep it in, the edit may be wherever the others do not keep it out.
            free = not (self.words.source_inside or self.words.target_inside)
            inside = [_stands_out(F.max_pool2d(m, 3, 1, 1), size, self.threshold) | free for m in maps[:2]]
            bound = self.threshold if self.outside_threshold is None else self.outside_threshold
            outside = [_stands_out(m, size, bound) for m in maps[2:]]
            parts.append(((inside[0] | inside[1]) & ~(outside[0] | outside[1])).float())
        return parts[0] if len(parts) == 1 else parts[0].to(parts[1].device) * parts[1]


def _stands_out(heat, size, threshold):
    heat = F.interpolate(heat, size)
    return heat > threshold * heat.amax((-2, -1), keepdim=True)


def blend(x, clean, source, weight, sigma, next_sigma):
    """The clean prediction (B, C, H, W) that Euler's step from ``sigma`` to ``next_sigma`` carries onto ``source``
    where ``weight`` is 0, and that stays ``clean`` where it is 1.

    ``x`` is the latent at ``sigma``, ``source`` the source's latent at ``next_sigma``, below ``sigma``.
    """
    ratio = next_sigma / sigma
    landing = (source - ratio * x) / (1 - ratio)
    return torch.lerp(landing, clean, weight.to(clean).expand_as(clean))


def changed(edited, source):
    """Where ``edited`` (B, C, h, w) is not ``source`` (B or 1, C, h, w) any more: (B, h, w) of 0 and 1.

    After a local blend that is the mask of its last step, since elsewhere both agree to rounding.
    """
    return ((edited - source).abs().amax(1) > 1e-4 * source.std()).float()
