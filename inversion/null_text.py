"""Null-text inversion (Mokady et al. 2023): an embedding for each step that takes the empty text's place.

Guidance drives a drawing off the trajectory that a picture was inverted along. The embedding that the guided step
leans away from is learned, step by step, so that the step lands on the trajectory after all.
"""

import math
from dataclasses import dataclass

import torch

from .ddim import step_down

PAPERS_STEPS = 50


@dataclass(frozen=True)
class NullText:
    """``guidance`` is the scale that the embeddings are learned for. At step i of 50 Adam makes at most ``inner``
    updates at the rate ``rate`` * (1 - i/100), and stops after the one that was made from a loss below ``tolerance`` +
    2e-5 * i, or never where ``tolerance`` is 0. Among another number of steps i is scaled to 50: the papers' code is
    written for those, and its rate would be negative from step 101 on. With ``warm`` a step starts from what the step
    before it learned, as in the paper; without, from the empty text, as in Dynamic Prompt Learning's code."""

    guidance: float = 7.5
    inner: int = 10
    rate: float = 0.01
    tolerance: float = 1e-5
    warm: bool = True

    def schedule(self, step, steps):
        """The rate, and the loss below which learning stops, at the 0-based ``step`` of ``steps``."""
        i = step * PAPERS_STEPS / steps
        return self.rate * (1 - i / 100), self.tolerance + 2e-5 * i if self.tolerance else 0.0


@dataclass(frozen=True, eq=False)
class Progress:
    """What is learned so far: ``nulls``, a list of (B, T, C); ``x`` (B, C, h, w), where the guided drawing stands;
    ``losses``, a list over steps of lists over pictures of lists over updates."""

    nulls: list
    x: torch.Tensor
    losses: list

    def __len__(self):
        return len(self.nulls)

    def tensors(self):
        """What a file keeps of it, beside the losses."""
        return {"nulls": torch.stack(self.nulls), "x": self.x}

    @classmethod
    def restored(cls, tensors, losses):
        return cls(list(tensors["nulls"]), tensors["x"], losses)


def begin(latents):
    """The :class:`Progress` of a run that has not learned anything yet."""
    return Progress([], latents[0].float().clone(), [])


def papers_count(levels):
    """How many steps the papers' code counts on these sigmas, which run from noise to picture: the moves between them,
    and one more on its own grid, which ends above 0, for the step at t = 0 that moves nothing."""
    return len(levels) - (levels[-1] == 0)


def guide(clean, empty, scale):
    return empty + scale * (clean - empty)


def learn(settings, denoise, sigmas, latents, null, progress, report):
    """Yields the :class:`Progress` after each step that it still lacks.

    ``denoise(x, sigma)`` predicts the clean latent under the source's text; ``denoise(x, sigma, embedding, rows)``
    under an ``embedding`` (b, T, C) for the pictures numbered ``rows``, with a gradient where grad mode is on.
    ``sigmas`` (S+1,), ``latents`` (S+1, B, C, h, w), ``null`` (B or 1, T, C) the empty text's embedding.
    ``report(step, update, loss, clean, x)`` is called after every update, with the guided prediction.

    The loss is the mean squared distance between the guided step and the trajectory's next latent, in the papers' own
    scale x / sqrt(1 + sigma^2) where noise is at most of unit variance; all thresholds are in that scale. Each picture
    of a batch learns its own embedding and stops on its own. Raises FloatingPointError when a loss is not finite.
    """
    levels = [float(s) for s in sigmas]
    steps = papers_count(levels)
    null = null.float().expand(latents.shape[1], -1, -1)
    for step in range(len(progress), len(levels) - 1):
        with torch.no_grad():
            clean = denoise(progress.x, levels[step])
        start = progress.nulls[-1] if settings.warm and len(progress) else null
        learned, x, losses = learn_step(
            settings, denoise, step, steps, levels[step], levels[step + 1], progress.x, latents[step + 1], clean, start,
            report,
        )
        progress = Progress([*progress.nulls, learned], x, [*progress.losses, losses])
        yield progress


def learn_step(settings, denoise, step, steps, high, low, x, goal, clean, start, report):
    """One step of :func:`learn`, from sigma ``high`` to ``low``: (embeddings (B, T, C), the x it lands on, losses).

    ``step`` counts from 0 among ``steps`` as the papers' code counts them (:func:`papers_count`). ``x`` and ``goal``
    (B, C, h, w) are where it stands and where it should land, ``clean`` the prediction under the source's text,
    ``start`` (B, T, C) where learning begins.
    """
    leaves = [start[i : i + 1].clone().requires_grad_() for i in range(len(x))]
    rate, enough = settings.schedule(step, steps)
    optimizer = torch.optim.Adam(leaves, lr=rate)
    losses = [[] for _ in leaves]
    active = list(range(len(x)))
    for update in range(settings.inner):
        rows = torch.tensor(active, device=x.device)
        with torch.enable_grad():
            empty = denoise(x[rows], high, torch.cat([leaves[i] for i in active]), rows)
            landed = step_down(x[rows], guide(clean[rows], empty, settings.guidance), high, low)
            loss = (landed - goal[rows]).square().flatten(1).mean(1) / (1 + low**2)
            optimizer.zero_grad()  # to None, so that Adam leaves pictures that have stopped alone
            loss.sum().backward()
        optimizer.step()
        values = loss.tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(f"the loss of step {step + 1} is not a finite number")
        for i, value in zip(active, values, strict=True):
            losses[i].append(value)
        shown = clean.index_copy(0, rows, guide(clean[rows], empty.detach(), settings.guidance))
        report(step, update, sum(values) / len(values), shown, x)
        active = [i for i in active if losses[i][-1] >= enough]
        if not active:
            break
    learned = torch.cat(leaves).detach()
    with torch.no_grad():
        empty = denoise(x, high, learned, torch.arange(len(x), device=x.device))
        x = step_down(x, guide(clean, empty, settings.guidance), high, low)
    check_learned(step, learned, x)
    return learned, x, losses


def check_learned(step, *tensors):
    """Raises FloatingPointError where what a step learned is not finite; after its last update no loss would tell."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise FloatingPointError(f"what step {step + 1} learned is not a finite number")
