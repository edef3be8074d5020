"""The one file here that speaks ComfyUI's conventions: grids, running a model outside a stock sampler, model identity.

What it uses of the host, and the releases that each use was checked on, is in tests/host_uses.md.
"""

import contextlib
import hashlib
import itertools
import os
import sys
from pathlib import Path

import comfy.latent_formats
import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfyui_version
import folder_paths
import latent_preview
import torch
from comfy.conds import CONDCrossAttn
from comfy.ldm.modules import attention
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save

from ..messages import legible
from . import disk, gradient, negative_prompt
from .ddim import draw, papers_sigmas
from .trajectory import coarsest, one_text

VERSION = "0.10.0"  # this pack's, as in pyproject.toml

# Where packs hang functions that bend the prediction after the model has spoken.
GUIDANCE = ("sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function")
# Windows over the frames of a batch: ComfyUI finds its place in them by a sampler's levels, which are not walked here.
WINDOWS = "context_handler"

PIXELS = 8  # of a picture to a latent's one, each way, in every Stable Diffusion
OURS = "attune"  # the key of this pack's own wrappers
SKIPPING = (WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = (ResBlock, SpatialTransformer)  # what is computed again for backward

LEVELS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 14.5)  # noise levels at which a MODEL is asked for its timestep

HOST_GRID = "host (ends at t = 1)"
PAPERS_GRID = "papers (ends at t = 0)"


def schedule(model, steps, grid):
    """SIGMAS from noise to picture on one of the two grids that DDIM is written with. Raises ValueError for more steps
    than the MODEL has noise levels."""
    sampling = model.get_model_object("model_sampling")
    table = sampling.sigmas.cpu().float()
    if grid == PAPERS_GRID and steps <= len(table):
        sigmas = papers_sigmas(table, steps)
    else:
        sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", steps).cpu().float()
    if steps > len(table) or not falls(sigmas):
        raise ValueError(
            f"The steps are {steps}, but the MODEL's table has {len(table)} noise levels; set steps of Attune DDIM "
            f"Inversion to {len(table)} or fewer, or take the Model Sampling node (LCM, say) before it out."
        )
    return sigmas


def falls(sigmas):
    """Whether SIGMAS are a way from noise to picture: two levels or more, each below the one before."""
    return len(sigmas) >= 2 and not bool((sigmas.diff() >= 0).any())


def whole_schedule(model, sigmas):
    """The user's SIGMAS in fp32. Raises ValueError where they are not a way from noise to a finished picture."""
    sigmas = sigmas.cpu().float()
    if not falls(sigmas) or float(sigmas[-1]) > lowest_sigma(model):
        ends = f"from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}" if len(sigmas) else "none"
        raise ValueError(
            f"The SIGMAS are {len(sigmas)} levels, {ends}, but inversion needs levels that fall from noise to a "
            "finished picture; connect a scheduler's whole SIGMAS to Attune DDIM Inversion."
        )
    return sigmas


def lowest_sigma(model):
    return float(model.get_model_object("model_sampling").sigma_min)


def describe_model(model):
    """What tells one MODEL from another, as plain values: its family, formats, how it samples, and of its weights, as
    the merges on them leave them, one number each, None for what is quantised beyond reading. A LoRA adds to weights
    and leaves the model the same one, so it is not in them."""
    inner, sampling = model.model, model.get_model_object("model_sampling")
    lineage = type(sampling).__mro__
    kinds = [c.__name__ for c in lineage if c.__module__ == comfy.model_sampling.__name__]
    biases, matrices, dtypes = [], [], {"float32"}
    for place, module in inner.diffusion_model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            is_bias = name == "bias"
            if name not in ("weight", "bias") or is_bias != (len(weight.shape) == 1):
                continue  # scales, of norms and of quantised weights
            key = f"diffusion_model.{place}.{name}"
            # While a model is loaded its weights may hold a LoRA or a merge; the host keeps what they were.
            weight = model.backup[key].weight if key in model.backup else weight
            convert = None if is_bias else getattr(module, "convert_weight", None)
            (biases if is_bias else matrices).append(_probe((weight, convert), model.patches.get(key, ())))
            if _readable(weight):
                dtypes.add(str(weight.dtype).removeprefix("torch."))
    return {
        "family": f"{type(inner.model_config).__name__} ({type(inner.diffusion_model).__name__})",
        "latent_format": type(inner.latent_format).__name__,
        "prediction": next(k for k in kinds if not k.startswith("ModelSampling")),
        # LCM, say, is of the kind EPS but has rules of its own.
        "sampling": next((c.__name__ for c in lineage if "calculate_denoised" in vars(c)), ""),
        "timesteps": [float(sampling.timestep(torch.tensor([sigma]))) for sigma in LEVELS],
        "dtype": coarsest(dtypes),
        "weights": biases[:: max(1, len(biases) // 24)],  # all that older files hold
        "probes": biases + matrices,
    }


def _readable(weight):
    """Whether a weight's numbers can be read one by one: those that packs quantise in a form of their own cannot."""
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) or len(weight.shape) == 1  # biases never are
    return plain and weight.is_floating_point() and not weight.is_meta


def _probe(kept, patches):
    """A weight's first number as merges leave it, by the host's rules; None where it or one that is merged into it is
    not readable.

    ``kept`` is the weight as loaded, and what turns its numbers into those that count, or None. Of the ``patches``,
    those that add to the weight and keep all of it are LoRAs and the like, and those that only scale it are effects.
    """
    weight, convert = kept
    if not _readable(weight):
        return None
    number = _first(weight)
    number = float(number if convert is None else convert(number))
    for strength, patch, share, *_ in patches:
        if isinstance(patch, list):  # a weight of another model, with what is on it
            other = _probe(patch[0], patch[1:])
        elif strength and share != 1 and isinstance(patch, tuple):  # as ("diff", (tensor, ...)) or (tensor,)
            other = float(_first((patch[1] if len(patch) == 2 else patch)[0]))
        else:
            continue
        if other is None:
            return None
        number = number * share + strength * other
    return number


def _first(weight):
    """The first number of a tensor, fp32, without a copy of the rest."""
    return weight.detach()[(0,) * len(weight.shape)].float().cpu()


def describe_patches(model):
    """What LoRAs and merges do to the weights, as plain values: names and strengths."""
    return [[key, *(float(p[0]) for p in patches)] for key, patches in sorted(model.patches.items(), key=str)]


class _Walk(comfy.samplers.Sampler):
    """A sampler that hands the loaded model to a plain function and keeps what it returns."""

    def __init__(self, body):
        self.body = body
        self.result = None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        self.result = self.body(guider, latent_image, _every_evaluation(extra_args["model_options"]), callback)
        return latent_image


def _every_evaluation(model_options):
    """Options without the wrappers from which caching packs skip evaluations; here each one is needed."""
    options = dict(model_options["transformer_options"])
    options["wrappers"] = {
        kind: {k: v for k, v in table.items() if kind not in SKIPPING or k == OURS}
        for kind, table in options.get("wrappers", {}).items()
    }
    return {**model_options, "transformer_options": options}


def _run(model, conditionings, guidance, latent, steps, body):
    guider = comfy.samplers.CFGGuider(model)
    guider.model_options = {k: v for k, v in model.model_options.items() if k not in (*GUIDANCE, WINDOWS)}
    guider.inner_set_conds({k: v for k, v in conditionings.items() if v})
    guider.set_cfg(guidance)
    sampler, grid = _Walk(body), torch.zeros(steps + 1)
    callback = latent_preview.prepare_callback(model, steps)
    guider.sample(torch.zeros_like(latent), latent, sampler, grid, callback=callback, disable_pbar=True, seed=0)
    return sampler.result


def walk(model, positive, latent, sigmas, body, negative=None, guidance=1.0):
    """Runs ``body(denoise, latent, report)`` on a loaded model under ``positive``, with ``guidance`` away from
    ``negative`` where it is not 1.

    ``latent`` (B, C, h, w) is in the host's scale and reaches ``body`` in the model's own; whatever ``body`` returns
    is returned. ``denoise(x, sigma)`` predicts the clean latent, fp32. Guidance, caching and windows over frames that
    other packs put on MODEL are left out. Shows progress and previews, and stops within one evaluation of Cancel.
    """
    steps = len(sigmas) - 1

    def run(guider, latent, options, callback):
        def denoise(x, sigma):
            comfy.model_management.throw_exception_if_processing_interrupted()
            return guider(x, _level(x, sigma), model_options=options, seed=0).float()

        def report(step, clean, x):
            callback(step, clean, x, steps)

        return body(denoise, latent, report)

    return _run(model, {"positive": positive, "negative": negative or []}, guidance, latent, steps, run)


def _level(x, sigma):
    return torch.full((len(x),), float(sigma), device=x.device)


# ---- gradients ---------------------------------------------------------------------------------------------------


def check_differentiable(model):
    """Raises ValueError for weights through which no gradient flows: quantised to 8 bits or fewer."""
    for parameter in model.model.diffusion_model.parameters():
        plain = type(parameter.data) in (torch.Tensor, torch.nn.Parameter)
        if parameter.dtype not in FLOATS or not plain:
            kind = str(parameter.dtype).removeprefix("torch.") if plain else type(parameter.data).__name__
            raise ValueError(
                f"The MODEL has {kind} weights, through which no gradient flows; load the checkpoint in fp16, bf16 or "
                "fp32 (weight_dtype of the loader, or ComfyUI started without its fp8 option)."
            )


class Network:
    """A loaded model through which gradients flow to the texts that it is given."""

    def __init__(self, guider, options, pictures):
        self._guider, self._options, self._pictures = guider, options, pictures

    def denoise(self, x, sigma, text=None, rows=None, half="negative"):
        """The clean latent (b, C, h, w), fp32, of the pictures numbered ``rows``, under ``text`` (b, T, C) in the place
        of that of the "positive" or the "negative"; without them, of all, under the positive as it is."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        conds = self._guider.conds["positive"]
        if text is not None:
            conds = [_with_text(self._guider.conds[half][0], text, rows, self._pictures)]
        level = _level(x, sigma)
        (clean,) = comfy.samplers.calc_cond_batch(self._guider.inner_model, [conds], x, level, self._options)
        return self.differentiable(clean).float()

    @staticmethod
    def differentiable(found):
        """``found``. Raises ValueError where it should have a gradient and has none."""
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ValueError(
                "No gradient came back through the MODEL: its attention or a pack's patch on it has none; connect the "
                "MODEL from before that pack's node, or start ComfyUI with --use-pytorch-cross-attention."
            )
        return found


def learn(model, positive, negative, latent, steps, body, clip=None):
    """As :func:`walk`, for learning an embedding: ``body(network, latent, report)`` runs outside inference mode with a
    :class:`Network`. Half-precision weights compute in fp32 here, since the gradients would vanish. Through ``clip``,
    where one is given, gradients flow as well.

    MODEL, CLIP and whatever shares their weights are afterwards as they were.
    """
    check_differentiable(model)
    with torch.inference_mode(False), torch.no_grad():
        model = model.clone()
        if any(p.dtype != torch.float32 for p in model.model.diffusion_model.parameters()):
            model.set_model_compute_dtype(torch.float32)
        _drop_compiled(model)
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = _pytorch_attention
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        unet = model.model.diffusion_model

        def run(guider, latent, options, callback):
            def report(step, clean, x):
                callback(step, clean, x, steps)

            blocks = [m for m in unet.modules() if isinstance(m, BLOCKS)]
            # A third of the weights on top of them, so that the peak stays within half of a guided sampling step's.
            spare = sum(p.numel() * p.element_size() for p in unet.parameters()) // 3
            with contextlib.ExitStack() as stack:
                if clip is not None:
                    # Together, so that neither has to make room for the other.
                    comfy.model_management.load_models_gpu([guider.model_patcher, clip.patcher], force_full_load=True)
                    stack.enter_context(gradient.ordinary(clip.cond_stage_model))
                    stack.enter_context(gradient.norms_apart(clip.cond_stage_model))
                stack.enter_context(gradient.ordinary(guider.inner_model))
                stack.enter_context(gradient.checkpointed(blocks, lambda m: isinstance(m, SpatialTransformer), spare))
                return body(Network(guider, options, len(latent)), latent, report)

        latent = latent.clone()
        return _run(model, {"positive": _cloned(positive), "negative": _cloned(negative)}, 1.0, latent, steps, run)


def _pytorch_attention(_kernel, q, k, v, heads, *args, **kwargs):
    # Kernels of other libraries may have no backward, and say nothing.
    return attention.attention_pytorch(q, k, v, heads, *args, **kwargs)


def _drop_compiled(model):
    # A compiled network does not see forwards that are replaced.
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, "torch.compile")


def between(conditioning, empty, share):
    """The CONDITIONING a ``share`` of the way to the ``empty`` one (:func:`negative_prompt.between`), pooled text
    included. Raises ValueError for several texts in either, and for another text encoder's."""
    text, extras = one_text(conditioning, "TRAJECTORY's", "invert the image under one CLIP Text Encode")
    other, theirs = one_text(empty, "empty", "connect one CLIP Text Encode to Attune Negative-Prompt Inversion")
    if text.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"The empty text is {other.shape[-1]} wide and the TRAJECTORY's {text.shape[-1]}, as of another model "
            "family; connect a CLIP Text Encode of the inversion's CLIP to empty on Attune Negative-Prompt Inversion."
        )
    # A caption of several chunks meets as many empty ones.
    other = other.repeat(1, -(-text.shape[1] // other.shape[1]), 1)[:, : text.shape[1]]
    pooled = [extra.get("pooled_output") for extra in (extras, theirs)]
    if all(torch.is_tensor(one) for one in pooled):
        extras = {**extras, "pooled_output": negative_prompt.between(*pooled, share)}
    return [[negative_prompt.between(text, other, share), extras]]


def _cloned(conditioning):
    """Tensors that were made in inference mode cannot take part in a graph."""
    return [
        [tensor.clone(), {k: v.clone() if torch.is_tensor(v) else v for k, v in extras.items()}]
        for tensor, extras in conditioning
    ]


def _with_text(template, embedding, rows, pictures):
    """A prepared conditioning with another text, for some of the pictures."""
    conds = {}
    for name, cond in template["model_conds"].items():
        own_rows = torch.is_tensor(cond.cond) and pictures > 1 and len(cond.cond) == pictures
        conds[name] = cond._copy_with(cond.cond[rows]) if own_rows else cond
    return {**template, "model_conds": {**conds, "c_crossattn": CONDCrossAttn(embedding)}}


# ---- recording ---------------------------------------------------------------------------------------------------


def record(model, noise, cfg, sampler, sigmas, positive, negative, latent, noise_mask, seed):
    """Samples as the host's Sampler (Custom) does, and keeps what the network is shown at each of ``sigmas``.

    Returns (samples (B, C, h, w) in the host's scale, latents (S+1, B, C, h, w) in the model's). Raises ValueError for
    a sampler that passes a noise level by.
    """
    seen = {}

    def predict(executor, x, timestep, *args, **kwargs):
        seen.setdefault(float(timestep[0]), x.detach().float().cpu().clone())
        return executor(x, timestep, *args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "attune_record", predict)
    callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
    samples = comfy.sample.sample_custom(
        watched, noise, cfg, sampler, sigmas, positive, negative, latent,
        noise_mask=noise_mask, callback=callback, disable_pbar=True, seed=seed,
    )  # fmt: skip
    path = []
    for sigma in map(float, sigmas[:-1]):
        level = min(seen, key=lambda s: abs(s - sigma), default=float("inf"))
        if abs(level - sigma) > 1e-4 * sigma:
            raise ValueError(
                f"The sampler never asked the MODEL at noise level {sigma:.4g} of its SIGMAS, so its way cannot be "
                "recorded; choose one that visits each of them, such as euler, in the node that feeds sampler."
            )
        path.append(seen[level])
    path.append(to_model_scale(model, samples).float().cpu())
    return samples, torch.stack(path)


def noise_for(latent, seed):
    """The noise that the host's samplers add for a seed; (B, C, h, w)."""
    return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))


def start_of(model, trajectory, seed):
    """Where the host's samplers start from nothing but noise on the trajectory's sigmas: (B, C, h, w), its scale."""
    sampling, sigma = model.get_model_object("model_sampling"), trajectory.sigmas[0]
    empty = torch.zeros_like(trajectory.noise)
    whole = float(sigma) >= float(sampling.sigma_max) * (1 - 1e-5)
    return sampling.noise_scaling(sigma, comfy.sample.prepare_noise(empty, seed), empty, whole)


def euler():
    """The host's SAMPLER whose steps are DDIM's."""
    return comfy.samplers.sampler_object("euler")


def fitting_latent(model, latent):
    """An empty LATENT with as many channels as the MODEL wants, as the host's samplers make it."""
    return comfy.sample.fix_empty_latent_channels(model, latent)


# ---- scales and schedules ----------------------------------------------------------------------------------------


def windows(model, sigmas):
    """Shares of the schedule (S+1,) whose edges lie between neighbouring noise levels, for per-step conditionings.

    The host turns a share into a noise level; this finds, by halving, the share that gives the middle (in the
    logarithm) of two levels. The ends are open, as 0 and 1.
    """
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    edges = [0.0]
    levels = [float(s) for s in sigmas]
    for high, low in zip(levels[:-2], levels[1:-1], strict=True):
        goal, first, last = (high * low) ** 0.5, 0.0, 1.0
        for _ in range(40):
            middle = (first + last) / 2
            first, last = (middle, last) if float(to_sigma(middle)) > goal else (first, middle)
        edges.append((first + last) / 2)
    return (*edges, 1.0)


def to_model_scale(model, latent):
    return model.model.process_latent_in(latent)


def to_host_scale(model, latent):
    return model.model.process_latent_out(latent)


def host_latent(trajectory, step):
    """A latent of a trajectory in the host's scale; the trajectory knows its own latent format."""
    return _format(trajectory).process_out(trajectory.latents[step])


def _format(trajectory):
    name, channels = trajectory.header["latent_format"], trajectory.latents.shape[2]
    base = comfy.latent_formats.LatentFormat
    formats = {k: v for k, v in vars(comfy.latent_formats).items() if isinstance(v, type) and issubclass(v, base)}
    if name not in formats:
        raise ValueError(f"The TRAJECTORY has the latent format {name}, which this ComfyUI does not know; update it.")
    if formats[name].latent_channels != channels:
        raise ValueError(
            f"The TRAJECTORY has {channels} channels, but the latent format {name} has "
            f"{formats[name].latent_channels}; connect one from an Attune inversion."
        )
    return formats[name]()


# ---- the host's folders and the node's text ----------------------------------------------------------------------

SUFFIX = ".trajectory.safetensors"
OUTPUT = " [output]"  # the host's mark of a file in its output folder


def trajectory_files():
    """Names of the trajectory files in the host's input folder, and in its output folder with the host's mark: of all
    that :func:`trajectory_path` takes."""
    names = []
    for base, mark in ((folder_paths.get_input_directory(), ""), (folder_paths.get_output_directory(), OUTPUT)):
        found = sorted(p.relative_to(base).as_posix() for p in Path(base).rglob("*" + SUFFIX))
        names += [name + mark for name in found if _inside(base, name)]
    return names


def _inside(base, name):
    """The whole file of a name in a folder of the host's, or None where there is none, or elsewhere."""
    try:
        name.encode("utf-8")  # else it can be told to no browser
        path, base = Path(base, name).resolve(), Path(base).resolve()
        whole = path.is_relative_to(base) and path.is_file() and path.stat().st_size > 0
    except (OSError, ValueError, RuntimeError):  # too long, NUL, links that go round
        return None
    return path if whole else None


def trajectory_path(name):
    """Where a name from :func:`trajectory_files` lies. Raises ValueError for one that leads elsewhere or nowhere."""
    if not isinstance(name, str) or not name.removesuffix(OUTPUT).endswith(SUFFIX):
        raise ValueError(
            f'The file "{name}" is no name that ends in {SUFFIX}; choose one from the list of Attune Load Trajectory.'
        )
    output = name.endswith(OUTPUT)
    base = folder_paths.get_output_directory() if output else folder_paths.get_input_directory()
    path = _inside(base, name.removesuffix(OUTPUT))
    if path is None:
        raise ValueError(
            f'There is no trajectory file "{name}" inside ComfyUI\'s input or output folder; choose one from the list '
            "of Attune Load Trajectory."
        )
    return path


def save_trajectory(prefix, content):
    """Writes a trajectory's bytes to a new file in the host's output folder and returns its name there.

    Raises ValueError for a prefix that leads out of the folder, and for what the disk refuses.
    """
    base = folder_paths.get_output_directory()
    return _write_new(prefix, base, SUFFIX, content, "output", "Attune Save Trajectory")


def save_embedding(prefix, vectors):
    """Writes vectors, text encoder's name -> (n, width), to the host's embeddings folder in the form that it reads, and
    returns how a prompt names them. Raises ValueError as :func:`save_trajectory` does."""
    content = save({"clip_" + name: rows.contiguous() for name, rows in vectors.items()})
    base, node = folder_paths.get_folder_paths("embeddings")[0], "Attune Save Learned Word"
    return "embedding:" + _write_new(prefix, base, ".safetensors", content, "embeddings", node).removesuffix(
        ".safetensors"
    )


def _write_new(prefix, base, suffix, content, what, node):
    try:
        folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, str(base))
        names = (f"{name}_{number:05}_{suffix}" for number in itertools.count(counter))
        path = disk.write_new(folder, names, content)
    except (OSError, ValueError) as problem:  # the latter for NUL
        raise ValueError(
            f'No file "{prefix}" can be written to ComfyUI\'s {what} folder ({disk.reason(problem)}); make room there, '
            f"or change filename_prefix in {node}, and run again before ComfyUI ends, since until then it still has "
            "what was to be saved."
        ) from problem
    except Exception as problem:  # the host raises a bare Exception for this
        raise ValueError(
            f'The filename_prefix "{prefix}" leads out of ComfyUI\'s {what} folder; give {node} a name inside it.'
        ) from problem
    return Path(os.path.abspath(path)).relative_to(os.path.abspath(base)).as_posix()


UNFINISHED = ("__attune", "unfinished")  # two underlines keep a folder there from being a user of the host's


def unfinished_path(key):
    """Where a run that ends early is kept: in the host's user folder, which it does not empty when it starts."""
    return Path(folder_paths.get_user_directory(), *UNFINISHED, f"{key}.safetensors")


def each(items):
    """Gives ``items`` one by one, and ends with the host's interrupt where the user has pressed Cancel."""
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item


def say(node_id, text):
    """Shows ``text`` on a node while it works; nothing where there is no server or no node."""
    if node_id is not None and "server" in sys.modules:
        sys.modules["server"].PromptServer.instance.send_progress_text(legible(text), node_id)


def versions():
    """What a file was written with."""
    return {"attune": VERSION, "comfyui": comfyui_version.__version__, "torch": torch.__version__}


def content_key(path):
    """A fingerprint of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- drawing again -----------------------------------------------------------------------------------------------


def draw_again(model, trajectory, negative, guidance):
    """The latents (S+1, B, C, h, w) that plain sampling visits from the trajectory's noise, under its conditioning."""

    def body(denoise, start, report):
        return draw(denoise, trajectory.noise.to(start), trajectory.sigmas, report)

    start = host_latent(trajectory, 0)
    return walk(model, trajectory.conditioning, start, trajectory.sigmas, body, negative, guidance).cpu()


def to_pixels(mask):
    """A MASK in the picture's size from one (B, h, w) in the latent's."""
    return mask.repeat_interleave(PIXELS, 1).repeat_interleave(PIXELS, 2)


def decode(vae, trajectory, latent):
    """Pictures (B, H, W, 3) in 0..1 of a latent in the trajectory's scale."""
    return vae.decode(_format(trajectory).process_out(latent))


def check_latent(model, latent, where):
    """Raises ValueError for a LATENT that this MODEL cannot take; ``where`` names the input and the node."""
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
    if not latent.isfinite().all():
        raise ValueError(
            "The LATENT has values that are no finite numbers (NaN or infinite), as SDXL's VAE gives in fp16; encode "
            f"the image again with ComfyUI's --fp32-vae, or by a VAE made for fp16, and connect that to {where}."
        )


def check_path(path, node):
    """``path``, latents of a run of ``node``. Raises ValueError where they are no finite numbers."""
    if not path.isfinite().all():
        raise ValueError(
            "The MODEL made latents that are no finite numbers (NaN or infinite), as weights in half precision can; "
            f"start ComfyUI with --force-fp32, or lower the cfg, and run {node} again."
        )
    return path
