"""The one file here that speaks ComfyUI's conventions: grids, running a model outside a stock sampler, model identity.

Host facts used (checked on 0.3.52 and 0.3.75): `CFGGuider.inner_set_conds` and `.sample`, a `Sampler` with its
`sample` signature, `calculate_sigmas`, `latent_preview.prepare_callback`, the latent format's process_in and _out.
"""

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import latent_preview
import torch

from .ddim import papers_sigmas

# Where packs hang functions that bend the prediction after the model has spoken.
GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")

HOST_GRID = "host (ends at t = 1)"
PAPERS_GRID = "papers (ends at t = 0)"


def schedule(model, steps, grid):
    """SIGMAS from noise to picture on one of the two grids that DDIM is written with."""
    sampling = model.get_model_object("model_sampling")
    if grid == PAPERS_GRID:
        return papers_sigmas(sampling.sigmas.cpu().float(), steps)
    return comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", steps).cpu().float()


def lowest_sigma(model):
    return float(model.get_model_object("model_sampling").sigma_min)


def describe_model(model):
    """What tells one MODEL from another, as plain values: its family, formats, and a few of its weights."""
    inner, sampling = model.model, model.get_model_object("model_sampling")
    kinds = [c.__name__ for c in type(sampling).__mro__ if c.__module__ == comfy.model_sampling.__name__]
    biases = [(n, p) for n, p in inner.diffusion_model.named_parameters() if n.endswith("bias") and p.ndim == 1]
    probe = []
    for name, weight in biases[:: max(1, len(biases) // 24)]:
        # While a model is loaded its weights may hold a LoRA or a merge; the host keeps what they were.
        kept = model.backup.get("diffusion_model." + name)
        weight = weight if kept is None else kept.weight
        probe.append(float(weight.detach().flatten()[0].float().cpu()))
    return {
        "family": f"{type(inner.model_config).__name__} ({type(inner.diffusion_model).__name__})",
        "latent_format": type(inner.latent_format).__name__,
        "prediction": next(k for k in kinds if not k.startswith("ModelSampling")),
        "weights": probe,
    }


class _Walk(comfy.samplers.Sampler):
    """A sampler that hands the loaded model to a plain function and keeps what it returns."""

    def __init__(self, body):
        self.body = body
        self.result = None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        def denoise(x, sigma):
            comfy.model_management.throw_exception_if_processing_interrupted()
            return guider(x, torch.full((len(x),), float(sigma), device=x.device), **extra_args).float()

        def report(step, clean, x):
            if callback is not None:
                callback(step, clean, x, len(sigmas) - 1)

        self.result = self.body(denoise, latent_image, report)
        return latent_image


def walk(model, conditioning, latent, sigmas, body):
    """Runs ``body(denoise, latent, report)`` on a loaded model, at guidance 1 under ``conditioning``.

    ``latent`` (B, C, h, w) is in the host's scale and reaches ``body`` in the model's own; whatever ``body`` returns
    is returned. Guidance that other packs put on MODEL is left out. Shows progress and previews, and stops within
    one evaluation of Cancel.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.model_options = {k: v for k, v in model.model_options.items() if k not in GUIDANCE}
    guider.inner_set_conds({"positive": conditioning})
    sampler = _Walk(body)
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=0)
    return sampler.result


def to_model_scale(model, latent):
    return model.model.process_latent_in(latent)


def to_host_scale(model, latent):
    return model.model.process_latent_out(latent)


def check_latent(model, latent):
    """Raises ValueError for a LATENT that this MODEL cannot take."""
    channels = model.model.latent_format.latent_channels
    shape = tuple(latent.shape)
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"The LATENT has shape {shape}, but the MODEL needs (pictures, {channels}, height/8, width/8); encode the "
            "picture with the VAE of the same checkpoint."
        )
    if shape[0] == 0 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(
            f"The LATENT has shape {shape} and so holds no picture; feed the node that encodes it at least one image."
        )
