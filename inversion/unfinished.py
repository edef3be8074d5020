"""Learning on a MODEL whose work outlives a Cancel and a crash: it is kept in a file of the host's user folder."""

import contextlib
import itertools
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import disk, dynamic_prompt, host, null_text
from .file import fingerprint

log = logging.getLogger("attune")
SHARES = 10  # a crash loses a tenth of the steps at most, and as many files are written in all
SCHEDULE = "scaled to 50 steps"  # so that what an earlier version began otherwise is not gone on with
FILES, MOST = 8, 1 << 30  # of unfinished work, and bytes of it; 50 steps of SDXL take some 30 MB


def learn(model, trajectory, negative, settings, node_id=None):
    """The null embeddings (S, B, T, C), fp32 on the CPU, for :class:`null_text.NullText` ``settings``.

    Goes on from where an earlier run on the same trajectory, model and settings was stopped; the result is the same as
    without the stop. Raises ValueError for a model without gradients or a loss that is not finite.
    """
    text, steps = negative[0][0], len(trajectory.sigmas) - 1
    positive = [tensor for tensor, _ in trajectory.conditioning]
    key = [SCHEDULE, asdict(settings), *_identity(model, trajectory), *positive, text]
    run = _Run(
        "Null-text inversion", "learning_rate in Attune Null-Text Inversion", null_text.Progress, key, steps, node_id
    )

    def body(network, start, report):
        latents = trajectory.latents.clone().to(start)
        run.begin(null_text.begin(latents), latents.device)

        def tell(step, update, loss, clean, x):
            report(step * settings.inner + update, clean, x)
            host.say(node_id, f"step {step + 1} of {steps}, update {update + 1}: loss {loss:.2e}")

        null = text.clone().to(latents)
        learning = null_text.learn(settings, network.denoise, trajectory.sigmas, latents, null, run.last, tell)
        return run.follow(learning)

    picture = host.host_latent(trajectory, -1)
    with run.kept():
        done = host.learn(model, trajectory.conditioning, negative, picture, steps * settings.inner, body)
    flat = [loss for pictures in done.losses for losses in pictures for loss in losses]
    # On a MODEL without an edit nothing sees the sampler's cfg, so it is said here.
    run.note(f"{len(flat)} updates in {steps} steps, last loss {flat[-1]:.2e}; sample at cfg {settings.guidance:g}")
    return torch.stack(done.nulls).float().cpu()


def learn_words(model, clip, trajectory, texts, start, task, encode, look, settings, nulls, node_id=None):
    """The :class:`dynamic_prompt.Progress` of learning what ``task`` says from the vectors ``start`` on.

    ``texts`` are the prompt's and the empty text's CONDITIONING, ``encode(picture, vectors)`` a picture's prompt,
    (1, T, C) with a gradient, ``look(run)`` the cross-attention of the pass that ``run()`` makes; the rest is as for
    :func:`dynamic_prompt.learn`. Resumes as :func:`learn` does, and raises the same.
    """
    steps = len(trajectory.sigmas) - 1
    positive, negative = texts
    outside = [mask for mask in task.outside if mask is not None]
    key = [
        SCHEDULE, asdict(settings), nulls and asdict(nulls), *_identity(model, trajectory), positive[0][0],
        negative[0][0],
        [task.nouns, list(task.grid)], *start.values(), *outside,
    ]  # fmt: skip
    remedy = "learning_rate or null_learning_rate in Attune Dynamic Prompt"
    run = _Run("Dynamic prompt learning", remedy, dynamic_prompt.Progress, key, steps, node_id)
    updates = settings.inner + (nulls.inner if nulls else 0)
    picture = host.host_latent(trajectory, -1)

    def body(network, latent, report):
        latents = trajectory.latents.clone().to(latent)
        run.begin(dynamic_prompt.begin(latents, task), latents.device)
        shown = latents[0]

        def text(picture, vectors):
            return encode(picture, vectors).to(latents)

        def tell(step, update, losses, clean, x):
            nonlocal shown
            shown = shown if clean is None else clean
            if not settings.shared:
                done = step * updates + update + (settings.inner if "null-text" in losses else 0)
            elif "null-text" in losses:  # the words are finished for all steps before the first of these
                done = steps * settings.inner + step * nulls.inner + update
            else:
                done = step * settings.inner + update
            report(done, shown, x)
            parts = ", ".join(f"{name} {value:.2e}" for name, value in losses.items())
            host.say(node_id, f"step {step + 1} of {steps}, update {update + 1}: {parts}")

        def clean(x, sigma, texts, rows):
            return network.denoise(x, sigma, texts, rows, "positive")

        functions = dynamic_prompt.Network(
            text, lambda *at: network.differentiable(look(lambda: clean(*at))), clean, network.denoise
        )
        here = replace(task, outside=[mask if mask is None else mask.to(latents) for mask in task.outside])
        begun = {name: v.clone().to(latents) for name, v in start.items()}
        null = negative[0][0].clone().to(latents)
        learning = dynamic_prompt.learn(
            settings, nulls, here, functions, trajectory.sigmas, latents, begun, null, run.last, tell
        )
        return run.follow(learning)

    with run.kept():
        done = host.learn(model, positive, negative, picture, steps * updates, body, clip)
    count = sum("null-text" not in look for step in done.losses for picture in step for look in picture)
    run.note(f"{count} looks at the maps of the words in {steps} steps")
    return done


def _identity(model, trajectory):
    return host.describe_patches(model), trajectory.header, trajectory.sigmas, trajectory.latents


class _Run:
    """One learning of ``steps`` steps: what it has so far, and the file that keeps it where it ends early."""

    def __init__(self, name, remedy, kind, key, steps, node_id):
        self.name, self.remedy, self.kind, self.steps, self.node_id = name, remedy, kind, steps, node_id
        # The files outlive an update of the pack, which may learn otherwise.
        self.path = host.unfinished_path(fingerprint(host.VERSION, *key))
        self.every = -(-steps // SHARES)
        self.last = self.writer = self.writing = None

    def begin(self, fresh, device):
        self.last = found(self.path, self.kind, device) or fresh
        if len(self.last):
            self.note(f"going on from step {len(self.last) + 1} of {self.steps}, where an earlier run was stopped")

    def follow(self, learning):
        for progress in learning:
            self.last = progress
            if len(progress) % self.every == 0 and len(progress) < self.steps and self.written():
                self.writing = self.writer.submit(keep, *_parts(progress), self.path)
        return self.last

    def written(self):
        """Whether nothing is being written. Tells what went wrong with what was."""
        if self.writing is None:
            return True
        if not self.writing.done():
            return False
        if problem := self.writing.exception():
            self.note(f"what is learned so far could not be kept ({disk.reason(problem)})")
        self.writing = None
        return True

    def note(self, what):
        log.info("%s: %s.", self.name, what)
        host.say(self.node_id, what)

    @contextlib.contextmanager
    def kept(self):
        """In it, what is learned is kept every so many steps, in a thread that ends with it, and where it ends early;
        the file is gone where it ends well."""
        try:
            with ThreadPoolExecutor(1) as self.writer:
                yield
        except FloatingPointError as problem:
            self.forget()
            raise ValueError(f"{self.name} broke down: {problem}; lower {self.remedy}.") from problem
        except BaseException:
            if self.last is not None and len(self.last):
                stopped = f"stopped after step {len(self.last)} of {self.steps}"
                try:
                    keep(*_parts(self.last), self.path)
                    self.note(f"{stopped}; the same settings go on from there")
                except Exception as problem:  # a full disk must not hide why the run stopped
                    self.note(f"{stopped}, which could not be kept ({disk.reason(problem)})")
            raise
        self.written()
        self.forget()

    def forget(self):
        with contextlib.suppress(OSError):
            self.path.unlink()


def _parts(progress):
    """What a file keeps of ``progress``: tensors on the CPU, taken here since another thread has streams of its own,
    and JSON."""
    return {name: tensor.cpu().contiguous() for name, tensor in progress.tensors().items()}, json.dumps(progress.losses)


def keep(tensors, losses, path):
    """Writes what :func:`_parts` gives to ``path``, and removes the oldest of its neighbours where they are too many or
    too large together. Raises OSError."""
    digest = fingerprint(losses, *itertools.chain(*sorted(tensors.items())))
    content = save(tensors, {"losses": losses, "digest": digest})
    if len(content) > MOST:
        raise OSError(f"{len(content) >> 20} MB are more than the {MOST >> 20} MB for unfinished work")
    disk.write_over(path, content)
    room, others = MOST - len(content), []
    for other in set(path.parent.glob("*" + path.suffix)) - {path}:
        with contextlib.suppress(OSError):  # another process may remove it, too
            others.append((other.stat().st_mtime, other.stat().st_size, other))
    for number, (_, size, other) in enumerate(sorted(others, reverse=True), 2):
        room -= size
        if number > FILES or room < 0:
            with contextlib.suppress(OSError):
                other.unlink()


def found(path, kind, device="cpu"):
    """The Progress of a ``kind`` in ``path``, or None where there is none or it is not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            about = file.metadata()
        if about["digest"] != fingerprint(about["losses"], *itertools.chain(*sorted(tensors.items()))):
            return None
        return kind.restored({name: t.to(device) for name, t in tensors.items()}, json.loads(about["losses"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return None
