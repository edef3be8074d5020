"""Editing in turns: a finished edit becomes the next source without passing through the VAE. torch only.

Outside the masks the way of the very first picture is kept, so nothing there drifts however many turns there are; and
the finished picture shows the first picture's own pixels there.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Turn:
    """One finished turn: what it drew, from which seed, where known, and the ``share`` of the picture it could
    change."""

    prompt: str | None
    seed: int | None
    share: float


@dataclass(frozen=True, eq=False)
class Turns:
    """The turns so far, and the pixels (B or 1, H, W), 0 or 1, that any of their masks touched."""

    done: tuple
    touched: torch.Tensor

    def then(self, turn, touched):
        return Turns((*self.done, turn), torch.maximum(self.touched, touched))

    def text(self):
        """The history, a line a turn."""
        lines = []
        for number, turn in enumerate(self.done, 1):
            seed = "" if turn.seed is None else f", seed {turn.seed}"
            lines.append(f"{number}. {turn.prompt or 'a text of its own'}{seed}, mask {turn.share:.0%} of the picture")
        return "\n".join(lines)


def next_source(source, edited, region, conditioning, negative, prompt):
    """The :class:`Trajectory` of a finished edit as a source: ``edited``'s way in ``region`` (B or 1, h, w), 0 or 1,
    and the ``source``'s way elsewhere. Both must be on the same grid.

    What was learned for the source does not hold for it and is left out.
    """
    latents = torch.where(region[None, :, None] > 0, edited.latents, source.latents)
    header = {**edited.header, "method": "turn", "prompt": prompt}
    return replace(
        edited, steps=source.steps, latents=latents, header=header, conditioning=conditioning, negative=negative,
        nulls=None, windows=(), learned=None,
    )  # fmt: skip


def paste(first, finished, touched, feather):
    """The ``finished`` picture (B, H, W, 3) where ``touched`` (B or 1, H, W) is 1, and the ``first`` elsewhere, bit for
    bit.

    The border is soft over ``feather`` pixels, all of them inside, but where a mask is too narrow for that.
    """
    inside = touched[:, None]
    if feather:
        reach = (feather + 1) // 2
        # A mean over a window that reaches as far as the mask was shrunk by ends exactly at the mask's border.
        shrunk = -_greatest(-inside, reach)
        soft = _around(F.avg_pool2d, shrunk, reach)
        # What is hardly wider than its border shall still show whole, and so shall what vanished when it was shrunk.
        soft = soft / _greatest(soft, 2 * reach).clamp(min=1e-6)
        inside = torch.maximum(soft, inside * (1 - _greatest(shrunk, reach)))
    share = inside.movedim(1, -1)
    return torch.where(share > 0, first + share * (finished - first), first)


def _greatest(x, reach):
    """The greatest value of (B, 1, H, W) within ``reach`` pixels of each."""
    return _around(F.max_pool2d, x, reach)


def _around(pool, x, reach):
    """A pool over the square of ``reach`` pixels around each; by rows and by columns, which is the same and quick."""
    x = F.pad(x, [reach] * 4, mode="replicate")
    return pool(pool(x, (2 * reach + 1, 1), 1), (1, 2 * reach + 1), 1)
