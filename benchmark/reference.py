"""DDIM inversion, null-text inversion and direct inversion as their papers' code does them, on diffusers.

Written from the papers' formulas with diffusers' scheduler, in its coordinates
z_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, and sharing nothing with Attune's own code, which it is there to check.

Indexing, everywhere here: a run of S steps has timesteps t_0 > ... > t_{S-1} and S + 1 latents from noise to picture.
Step i leads from latents[i], which lies at t_i, to latents[i + 1]; latents[S] is the picture.

On OFFSET_0 the last step is an identity: t_{S-1} = 0, and below it the schedule stays where it is, so latents[S - 1]
and latents[S] agree up to rounding. It is kept, as in the papers' code; leave out latents[S] to compare with a run
that has no such step.
"""

import torch
from diffusers import DDIMScheduler
from torch.nn import functional as F

OFFSET_1 = "offset 1"  # 50 steps: t = 981, 961, ..., 1, and then to no noise at all
OFFSET_0 = "offset 0"  # 50 steps: t = 980, 960, ..., 0, and then to the noise of t = 0 again
LATER = "later"
CURRENT = "current"


def scheduler(kind, steps):
    """SD's DDIMScheduler on the grid ``kind`` (OFFSET_1 or OFFSET_0), set to ``steps``, a divisor of 1000 below it.

    Raises ValueError for any other number of steps: implementations disagree on how to round their stride.
    """
    if kind not in (OFFSET_1, OFFSET_0):
        raise ValueError(f"The grid is {kind!r}, but it must be {OFFSET_1!r} or {OFFSET_0!r}.")
    if not 0 < steps < 1000 or 1000 % steps:
        raise ValueError(f"{steps} steps do not fit 1000 timesteps; choose a divisor of 1000 that is below it.")
    ddim = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=kind == OFFSET_1,
        steps_offset=int(kind == OFFSET_1),
    )
    ddim.set_timesteps(steps)
    return ddim


def _predict(unet, z, t, text):
    return unet(z, t, encoder_hidden_states=text.expand(len(z), -1, -1)).sample


def _predict_both(unet, z, t, null, cond):
    """Both branches in one call, the unconditional one first, as the papers' code lays them out."""
    text = torch.cat([null.expand(len(z), -1, -1), cond.expand(len(z), -1, -1)])
    return _predict(unet, torch.cat([z, z]), t, text).chunk(2)


def _down(ddim, z, t, eps_null, eps_cond, guidance):
    """One guided DDIM step towards the picture, from z at t."""
    return ddim.step(eps_null + guidance * (eps_cond - eps_null), t, z).prev_sample


def _abar(ddim, t):
    return ddim.alphas_cumprod[t] if t >= 0 else ddim.final_alpha_cumprod


def _up(ddim, z, below, t, eps):
    """The DDIM step turned round: from z at ``below`` to t > below (Prompt-to-Prompt's and null-text's `next_step`)."""
    low, high = _abar(ddim, below), _abar(ddim, t)
    x0 = (z - (1 - low) ** 0.5 * eps) / low**0.5
    return high**0.5 * x0 + (1 - high) ** 0.5 * eps


@torch.no_grad()
def ddim_invert(unet, scheduler_kind, latent, cond, steps, where=LATER):
    """From a picture to its noise at guidance 1 (Song et al. 2021, in the form of null-text inversion's code).

    ``latent`` (B, 4, h, w) is the picture in the model's scale, fp32; ``cond`` (1 or B, 77, width) its caption;
    ``scheduler_kind`` and ``steps`` as in :func:`scheduler`. ``where`` is the timestep at which the UNet is asked on
    the way from z_{t-D} to z_t: LATER asks eps(z_{t-D}, t) as the papers' code does, CURRENT asks eps(z_{t-D}, t-D),
    and the first step, which has t-D < 0, at timestep 0.

    Returns (timesteps, latents): S integers, falling, and S + 1 tensors from noise to picture.
    """
    if where not in (LATER, CURRENT):
        raise ValueError(f"The timestep convention is {where!r}, but it must be {LATER!r} or {CURRENT!r}.")
    ddim = scheduler(scheduler_kind, steps)
    timesteps = ddim.timesteps.tolist()
    latents = [latent]
    for t in reversed(timesteps):
        below = t - 1000 // steps
        eps = _predict(unet, latents[-1], t if where == LATER else max(below, 0), cond)
        latents.append(_up(ddim, latents[-1], below, t, eps))
    return timesteps, latents[::-1]


def null_text(
    unet,
    scheduler_kind,
    latents,
    cond,
    null,
    guidance=7.5,
    inner=10,
    epsilon=1e-5,
    warm=True,
    early_stop=True,
    straightforward=False,
    scaled=True,
):
    """The null embedding of every step that makes a guided run follow a trajectory (Mokady et al. 2023, algorithm 1).

    ``latents`` are S + 1 tensors (1, 4, h, w) as :func:`ddim_invert` returns them; ``cond`` and ``null`` (1, 77, width)
    are the embeddings of the caption and of "". The authors' code is written for S = 50, where step i has the rate
    0.01 (1 - i/100); here i is the same share of 50 with another S, or without ``scaled`` the step, as in the code.
    Each step takes up to ``inner`` >= 0 steps of a fresh Adam on the MSE between its DDIM step and the trajectory's
    next latent, and stops after the update whose loss, taken before it, was below ``epsilon`` + 2e-5 i, unless
    ``early_stop`` is off. ``warm`` starts a step from the one before, else from ``null``.
    ``straightforward`` is the slow baseline: both branches anew in every inner step, and no early stop. Call it outside
    torch.inference_mode, with tensors and a UNet that were made outside it.

    Returns (nulls, losses, reconstruction): S tensors (1, 77, width); for each step the losses of its inner steps, in
    order; and the last latent (1, 4, h, w) of the guided run under these embeddings.
    """
    ddim = scheduler(scheduler_kind, len(latents) - 1)
    # A gradient that a caller's encoder left on these must not join the loss's.
    latents, cond = [z.detach() for z in latents], cond.detach()
    z, e = latents[0], null
    nulls, losses = [], []
    for number, t in enumerate(ddim.timesteps.tolist()):
        i = 50 * number / (len(latents) - 1) if scaled else number
        e = (e if warm else null).detach().clone().requires_grad_()
        adam = torch.optim.Adam([e], lr=1e-2 * (1 - i / 100))
        losses.append([])
        if not straightforward:
            with torch.no_grad():
                eps_cond = _predict(unet, z, t, cond)
        for _ in range(inner):
            if straightforward:
                eps_null, eps_cond = _predict_both(unet, z, t, e, cond)
            else:
                eps_null = _predict(unet, z, t, e)
            loss = F.mse_loss(_down(ddim, z, t, eps_null, eps_cond, guidance), latents[number + 1])
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses[-1].append(loss.item())
            if early_stop and not straightforward and loss.item() < epsilon + i * 2e-5:
                break
        nulls.append(e.detach())
        with torch.no_grad():
            z = _down(ddim, z, t, *_predict_both(unet, z, t, nulls[-1], cond), guidance)
    return nulls, losses, z


@torch.no_grad()
def direct(unet, scheduler_kind, latents, cond, null, guidance=7.5, every=1, scale=1.0):
    """The source branch of direct inversion (Ju et al. 2024, "PnP Inversion"), with its two ablations.

    ``latents`` are S + 1 tensors (B, 4, h, w) as :func:`ddim_invert` returns them; ``cond`` and ``null`` (1 or B, 77,
    width) are the embeddings of the caption and of "". After each guided DDIM step from wherever the branch stands,
    ``scale`` (0 to 1) of what is missing to the trajectory's next latent is added, on steps i = 0, ``every``,
    2 ``every``, ... and nothing on the others. With ``every`` 1 and ``scale`` 1 the branch is the trajectory.

    Returns the branch's S + 1 latents, from noise to picture.
    """
    ddim = scheduler(scheduler_kind, len(latents) - 1)
    branch = [latents[0]]
    for i, t in enumerate(ddim.timesteps.tolist()):
        z = branch[-1]
        rec = _down(ddim, z, t, *_predict_both(unet, z, t, null, cond), guidance)
        # lerp is rec + scale * (latents[i + 1] - rec), and exact at scale 1.
        branch.append(torch.lerp(rec, latents[i + 1], scale) if i % every == 0 else rec)
    return branch


@torch.no_grad()
def proximal(unet, scheduler_kind, noise, cond, null, guidance, steps, quantile, soft, together=False, shrink=False):
    """Draws under proximal guidance (Han et al. 2024, "ProxEdit"): of the difference of both predictions only what the
    proximal operator leaves of it is followed, at each step under a threshold of its own.

    ``noise`` (1, 4, h, w), ``cond`` and ``null`` (1, 77, width); the threshold is the ``quantile`` of the difference's
    absolute values. ``soft`` is the operator of the l1 norm, else that of the l0 norm. The authors' code: ``together``
    reckons the quantile over source and target rows, where the source, whose prompt is the negative, has differences
    of 0; ``shrink`` moves values towards 0 once under the name l0.

    Returns S + 1 latents, from noise to picture.
    """
    ddim = scheduler(scheduler_kind, steps)
    latents = [noise]
    for t in ddim.timesteps.tolist():
        away, towards = _predict_both(unet, latents[-1], t, null, cond)
        delta = towards - away
        sizes = delta.abs().flatten().tolist()
        sizes = sorted(sizes + [0.0] * len(sizes) if together else sizes)
        place = quantile * (len(sizes) - 1)
        under = int(place)
        over = min(under + 1, len(sizes) - 1)
        limit = sizes[under] + (place - under) * (sizes[over] - sizes[under])
        followed = F.softshrink(delta, limit) if soft or shrink else F.hardshrink(delta, limit)
        latents.append(ddim.step(away + guidance * followed, t, latents[-1]).prev_sample)
    return latents
