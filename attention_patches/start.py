"""Whether a sampling begins and goes on where the source's trajectory does, and the sentence for where it does not.

Every edit reads the source at its trajectory's noise levels. A sampler that adds noise, starts from another latent or
takes other steps generates an image all the same, only another one. torch only.
"""

import inspect

import torch

NEAR = 1e-2  # of a latent's size, by root mean square: far above rounding in any precision
# They take a noise sampler as those that add noise do, but are the forms that add none.
WITHOUT_NOISE = {"sample_res_multistep", "sample_res_multistep_cfg_pp"}


def off_trajectory(reference, x, sigma, sigmas, noise_added):
    """What is wrong with a sampling whose first latent is ``x`` (B, C, h, w) at ``sigma``, as one sentence, or None.

    ``reference`` is the :class:`reference.Reference` that it should start on, ``sigmas`` (n+1,) the sampler's levels,
    ``noise_added`` whether the sampler was given noise to add.
    """
    found = x.detach().float().cpu()
    goal = reference.latent(sigma) if reference.begin is None else reference.begin
    if not _near(found, goal) and (text := _another_start(reference, found, goal, sigma, noise_added)):
        return text
    if not _along(reference.sigmas, sigmas):
        return (
            f"The sampler takes {len(sigmas) - 1} steps at other sigmas than the {len(reference.sigmas) - 1} steps of "
            "the TRAJECTORY, so the source is only known in between; connect the sigmas of the node that made the "
            "TRAJECTORY to the sampler, or give the sampler the inversion's steps and scheduler."
        )
    return None


def _another_start(reference, x, goal, sigma, noise_added):
    if noise_added:
        return (
            "The sampler adds noise, so the edit does not start where the TRAJECTORY does; switch add_noise off "
            "(SamplerCustom has it under its advanced inputs, and KSampler (Advanced) takes the place of KSampler), "
            "and connect the LATENT of the node that made the TRAJECTORY."
        )
    if float(x.abs().amax()) < NEAR * float(goal.abs().amax()):
        return (
            "The sampler starts from an empty LATENT without noise, but the edit starts where the TRAJECTORY does; "
            "connect the LATENT of the node that made the TRAJECTORY to the sampler."
        )
    for at, latent in zip(reference.sigmas, reference.latents, strict=True):
        if _near(x, latent):
            return (
                f"The sampler starts at sigma {sigma:.4g} with the latent that the TRAJECTORY has at sigma "
                f"{float(at):.4g}, as with fewer steps than the inversion's; connect the sigmas of the node that made "
                "the TRAJECTORY to the sampler, or give the sampler the inversion's steps and scheduler."
            )
    if sigma < 0.999 * float(reference.sigmas[0]):
        return None  # part of the way down it may be the edit itself, which an earlier sampler began
    return (
        "The sampler starts from another latent than the TRAJECTORY, so the edit does not read the image that is "
        "generated; connect the LATENT of the node that made the TRAJECTORY to the sampler."
    )


def _near(x, latent):
    """Whether every picture of ``x`` (B, C, h, w) is ``latent`` (B or 1, C, h, w), to rounding."""
    apart = (x - latent).square().flatten(1).mean(1).sqrt()
    return bool((apart <= NEAR * latent.square().flatten(1).mean(1).sqrt()).all())


def _along(levels, sigmas):
    """Whether ``sigmas`` are neighbours among ``levels``; the last may be another, as where a sampler ends early."""
    levels, sigmas = torch.as_tensor(levels).float(), torch.as_tensor(sigmas).float().cpu()
    # Levels fall, so the nearest to the first one says where the others must be.
    first = int((levels - sigmas[0]).abs().argmin())
    there = levels[first : first + len(sigmas) - 1]
    return len(there) == len(sigmas) - 1 and torch.allclose(there, sigmas[:-1], rtol=1e-3, atol=1e-6)


def adds_noise(sampler, settings):
    """Whether a sampler's function, called with these ``settings``, adds noise at its steps, as ancestral ones do.

    By the habits of the k-diffusion samplers: those that can take a ``noise_sampler``, at the strength ``eta`` where
    they have one, times ``s_noise``; the others from ``s_churn`` on.
    """
    try:
        known = inspect.signature(sampler).parameters
    except (TypeError, ValueError):
        return False  # one that is not written in Python says nothing of itself
    values = {name: one.default for name, one in known.items() if one.default is not one.empty} | settings
    if values.get("s_noise", 1.0) == 0:
        return False
    if "eta" in values:
        return values["eta"] > 0
    if "noise_sampler" in known:
        return sampler.__name__ not in WITHOUT_NOISE
    return values.get("s_churn", 0.0) > 0
