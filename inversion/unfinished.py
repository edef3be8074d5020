"""Null-text inversion on a MODEL, whose work outlives a Cancel: it is kept in a file of the host's temporary folder."""

import json
import logging
from dataclasses import asdict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import host, null_text
from .file import fingerprint
from .null_text import Progress

log = logging.getLogger("attune")


def learn(model, trajectory, negative, settings, node_id=None):
    """The null embeddings (S, B, T, C), fp32 on the CPU, for :class:`null_text.NullText` ``settings``.

    Goes on from where an earlier run on the same trajectory, model and settings was stopped; the result is the same as
    without the stop. Raises ValueError for a model without gradients or a loss that is not finite.
    """
    text = negative[0][0]
    parts = [asdict(settings), host.describe_patches(model), trajectory.header, trajectory.sigmas, trajectory.latents]
    path = host.unfinished_path(fingerprint(*parts, trajectory.conditioning[0][0], text))
    steps = len(trajectory.sigmas) - 1
    last = None

    def body(denoise, start, report):
        nonlocal last
        latents = trajectory.latents.clone().to(start)
        last = found(path, latents.device) or null_text.begin(latents)
        if last.nulls:
            note(f"going on from step {len(last.nulls) + 1} of {steps}, where an earlier run was stopped")

        def tell(step, update, loss, clean, x):
            report(step * settings.inner + update, clean, x)
            host.say(node_id, f"step {step + 1} of {steps}, update {update + 1}: loss {loss:.2e}")

        null = text.clone().to(latents)
        for progress in null_text.learn(settings, denoise, trajectory.sigmas, latents, null, last, tell):
            last = progress
        return last

    def note(what):
        log.info("Null-text inversion: %s.", what)
        host.say(node_id, what)

    picture = host.host_latent(trajectory, -1)
    try:
        done = host.learn(model, trajectory.conditioning, negative, picture, steps * settings.inner, body)
    except FloatingPointError as problem:
        raise ValueError(
            f"Null-text inversion broke down: {problem}; lower learning_rate in Attune Null-Text Inversion."
        ) from problem
    except BaseException:
        if last is not None and last.nulls:
            try:
                keep(last, path)
                note(f"stopped after step {len(last.nulls)} of {steps}; the same settings go on from there")
            except OSError as problem:  # a full disk must not hide why the run stopped
                note(f"stopped after step {len(last.nulls)} of {steps}, which could not be kept ({problem})")
        raise
    path.unlink(missing_ok=True)
    flat = [loss for pictures in done.losses for losses in pictures for loss in losses]
    note(f"{len(flat)} updates in {steps} steps, last loss {flat[-1]:.2e}")
    return torch.stack(done.nulls).float().cpu()


def keep(progress, path):
    """Writes ``progress`` to ``path``; a file that is there already is replaced in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    tensors = {"nulls": torch.stack(progress.nulls).cpu(), "x": progress.x.cpu().contiguous()}
    save_file(tensors, part, {"losses": json.dumps(progress.losses)})
    part.replace(path)


def found(path, device="cpu"):
    """The :class:`null_text.Progress` in ``path``, or None where there is none or it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            nulls, x = file.get_tensor("nulls").to(device), file.get_tensor("x").to(device)
            return Progress(list(nulls), x, json.loads(file.metadata()["losses"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
