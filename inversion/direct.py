"""Direct inversion (Ju et al. 2024, PnP Inversion): the source branch is put back onto its trajectory at every step.

In this pack a source is read off its trajectory, so it is always pinned. What is here are the paper's ablations: a
source that is put back only now and then, or only part of the way.
"""

import torch

from .ddim import step_down


def pull(denoise, sigmas, latents, every, scale, report):
    """The latents (S+1, B, C, h, w) that the source branch visits.

    It is drawn by ``denoise(x, sigma)``, guidance included, and at every ``every``-th step, the first among them, moved
    by ``scale`` (0..1) of the way that parts it from ``latents``, its trajectory. ``every`` 1 and ``scale`` 1 give the
    trajectory itself. ``report(step, clean, x)`` is called after every prediction.
    """
    path = [latents[0]]
    levels = [float(s) for s in sigmas]
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        clean = denoise(path[-1], high)
        report(step, clean, path[-1])
        drawn = step_down(path[-1], clean, high, low)
        path.append(torch.lerp(drawn, latents[step + 1], scale) if step % every == 0 else drawn)
    return torch.stack(path)
