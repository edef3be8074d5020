"""DDIM inversion: a picture's way back to noise (Song et al. 2021; the inversion of Prompt-to-Prompt and null-text).

In the host's coordinates x = x0 + sigma * eps, a DDIM step without noise is one Euler step, in either direction.
"""

import torch

LATER = "later level (papers' code)"
CURRENT = "current level"


def papers_sigmas(all_sigmas, steps):
    """The papers' other grid: t = 0, T/steps, 2T/steps, ... ; (steps,) from noise to t = 0.

    ``all_sigmas`` (T,) are the model's, rising. The papers take a DDIM step at t = 0 too, which maps onto itself;
    here that step is left out, so `steps` grid points make `steps` - 1 moves.
    """
    times = torch.arange(steps) * (len(all_sigmas) // steps)
    return all_sigmas[times].flip(0)


def rescaled(x, sigma, level):
    """An x at ``sigma`` as it has to be at ``level`` for the network to be given the same x / sqrt(1 + sigma^2)."""
    return x * ((1 + level**2) / (1 + sigma**2)) ** 0.5


def placed(picture, sigma):
    """A latent (B, C, h, w) that a VAE gave, where an inversion begins at the level ``sigma``: the papers take it for
    their z = x / sqrt(1 + sigma^2) of that level, even where their grid ends above 0 and some noise belongs to it."""
    return rescaled(picture, 0.0, float(sigma))


def epsilon(denoise, x, sigma, level):
    """The noise prediction for x at ``sigma``, taken with the timestep of ``level``.

    The papers' code feeds the latent of one level with the timestep of the next. The network sees
    x / sqrt(1 + sigma^2), so x is rescaled to keep that input while sigma changes.
    """
    at = rescaled(x, sigma, level)
    return (at - denoise(at, level)) / level


def as_asked(latents, sigmas, step):
    """(x, sigma) that an inversion with LATER asked the model for on its way to level ``step``: the latent one level
    below, at this level's timestep. ``latents`` (S+1, B, C, h, w) and ``sigmas`` (S+1,) run from noise to picture."""
    high, low = float(sigmas[step]), float(sigmas[step + 1])
    return rescaled(latents[step + 1], low, high), high


def invert(denoise, picture, sigmas, where, lowest, report, refine=0):
    """Walks from a picture to noise.

    ``denoise(x, sigma)`` predicts the clean latent. ``picture`` (B, C, h, w) is taken to lie at the last of
    ``sigmas`` (S+1,), which run from noise to picture. ``where`` is LATER or CURRENT. ``lowest`` is the smallest
    sigma that the model knows: below it, and at 0 where no noise can be told from none, epsilon is taken there.
    ``refine`` more evaluations a step, each at the point that the one before it led to, turn the step into the exact
    inverse of the sampler's (fixed-point iteration, as in AIDI, Pan et al. 2023); 0 is the papers' plain step.
    ``report(step, clean, x)`` is called after every step.

    Returns the latents (S+1, B, C, h, w) from noise to picture, fp32.
    """
    x = picture.float()
    path = [x]
    rising = [float(s) for s in sigmas.flip(0)]
    for step, (low, high) in enumerate(zip(rising[:-1], rising[1:], strict=True)):
        level = high if where == LATER else max(low, lowest)
        eps = epsilon(denoise, x, low, level)
        for _ in range(refine):
            ahead = x + (high - low) * eps
            eps = (ahead - denoise(ahead, high)) / high
        report(step, x - low * eps, x)
        x = x + (high - low) * eps
        path.append(x)
    return torch.stack(path[::-1])


def step_down(x, clean, high, low):
    """One DDIM step from sigma ``high`` to ``low``, given the clean latent predicted at x."""
    return x + (x - clean) * ((low - high) / high)


def draw(denoise, noise, sigmas, report):
    """The way back: (S+1, B, C, h, w) from ``noise`` (B, C, h, w) along ``sigmas`` (S+1,) from noise to picture."""
    path = [noise.float()]
    levels = [float(s) for s in sigmas]
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        clean = denoise(path[-1], high)
        report(step, clean, path[-1])
        path.append(step_down(path[-1], clean, high, low))
    return torch.stack(path)
