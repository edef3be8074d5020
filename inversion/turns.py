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

    The border is soft over ``feather`` pixels, all of them inside.
    """
    inside = touched[:, None]
    if feather:
        reach = (feather + 1) // 2
        size, around = 2 * reach + 1, [reach] * 4
        # A mean over a window that reaches as far as the mask was shrunk by ends exactly at the mask's border.
        shrunk = -F.max_pool2d(-F.pad(inside, around, mode="replicate"), size, 1)
        inside = F.avg_pool2d(F.pad(shrunk, around, mode="replicate"), size, 1)
    share = inside.movedim(1, -1)
    return torch.where(share > 0, first + share * (finished - first), first)
