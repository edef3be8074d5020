"""Dynamic Prompt Learning on the demo model. Run through ``python3 dev.py bench dynamic-prompt``.

    dev.py bench dynamic-prompt tune      settings, on 40 scenes that no other part uses
    dev.py bench dynamic-prompt curve     figure 5(a): how well nouns' maps match the true masks, on 60 scenes
    dev.py bench dynamic-prompt background    which attention finds the background best, beside the true one
    dev.py bench dynamic-prompt swap      table 1: two words exchanged at once, beside null-text inversion
    dev.py bench dynamic-prompt speed     passes of the UNet, time and memory beside the cost of the authors' code

Scenes are built to leak: their two objects share a colour, share a shape, or stand on a background of strong texture
and light. Figure 5(a) on pictures of your own, and on a Stable Diffusion 1.x checkpoint:

    dev.py bench dynamic-prompt curve --checkpoint FILE --data manifest.json

The file is a list of {"picture": path, "caption": "a {cat} and a {dog}", "masks": [path, path]}: at least two nouns in
braces, and a black and white picture of each one's true place, in their order and of the picture's size, whose sides
are multiples of 8, at best of 64. Paths are taken from the file's folder. Without ``--checkpoint`` the demo model looks
at them. Table, curves and figures are kept in demo/run/ then.

``--weights`` takes other weights than the demo model's, such as those trained without supervision of the
attention. Every figure is printed, and kept in benchmark/dynamic_prompt.json.
"""

import argparse
import contextlib
import itertools
import json
import logging
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..attention_patches import background, maps, self_maps
from ..attention_patches import host as patches
from ..demo import checker, scenes
from ..demo.measure import RUN, Bench, call, is_demo
from ..demo.model import WEIGHTS, load_demo
from ..inversion import dynamic_prompt, gradient, host, unfinished
from ..inversion.ddim import as_asked
from ..inversion.dynamic_prompt import DynamicPrompt
from ..inversion.null_text import NullText
from ..inversion.report import decibels, psnr, structural_similarity
from ..inversion.trajectory import LearnedWords, Trajectory, negative_of, step_conditioning
from ..nodes import edit, invert, sheet
from ..nodes.tokens import AS_DRAWN, AS_INVERTED, AttuneBackgroundMask
from ..nodes.view import as_drawn
from .inversion import Clock
from .live import LiveBytes
from .metrics import iou_curve

RESULTS = Path(__file__).parent / "dynamic_prompt.json"
KINDS = ("one colour", "one shape", "strong background")
TUNING, TEST, SWAPS, SPEED, MASKS = 1, 2, 3, 4, 5  # which scenes a part draws
LEVEL, CLUSTERS, AGREEMENT = 256, 5, 0.2
THRESHOLDS = torch.linspace(0, 1, 51)
# The papers' 0.001 was chosen for CLIP's table; the demo's vectors, with a spread of 0.5 a number, are far larger.
RATES = (0.001, 0.01, 0.03, 0.1)
PAPERS_RATE = DynamicPrompt().rate
log = logging.getLogger("attune.bench")


# ---- scenes ------------------------------------------------------------------------------------------------------


def leaky(rng, kind):
    """A held-out scene of two objects of this kind."""
    while True:
        one = scenes.draw_scene(rng, held_out=True, objects=2)
        first = one.things[0]
        if kind == KINDS[0]:
            one = scenes.edit_thing(one, 1, color=first.color)
        elif kind == KINDS[1]:
            one = scenes.edit_thing(one, 1, shape=first.shape)
        else:
            one = replace(one, light=tuple(rng.uniform(-0.35, 0.35, 2)), texture=0.12)
        different = len({(t.color, t.shape) for t in one.things}) == 2
        if different and scenes.is_held_out(one) and one.background not in {t.color for t in one.things}:
            return one


def draw_scenes(count, seed, which):
    rng = np.random.default_rng([seed, 13, which])
    return [leaky(rng, KINDS[i % len(KINDS)]) for i in range(count)]


@dataclass(eq=False)
class Batch:
    """Some scenes with one trajectory, and where the tokens of their captions look."""

    scenes: list  # of the demo world; none of a user's pictures
    captions: list
    nouns: list  # a picture: W tuples of token positions
    pictures: torch.Tensor
    masks: list  # a picture: (nouns, H, W)
    trajectory: Trajectory
    outside: list = field(default_factory=list)  # a picture: what its nouns must not look at (2, N), the background
    others: list = field(default_factory=list)  # the same by noun masks: all but a noun's own parts
    seen: torch.Tensor | None = None  # (B, W, h, w), along the trajectory

    @property
    def tokens(self):
        """How many of a prompt's first tokens hold every noun."""
        return max([20, *(p + 1 for nouns in self.nouns for at in nouns for p in at)])


# ---- a user's pictures -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Own:
    """One picture of a user: (H, W, 3) in 0..1, its caption, its nouns' token positions and true masks
    (nouns, H, W)."""

    picture: torch.Tensor
    caption: str
    nouns: list
    masks: torch.Tensor


def opened(path, mode):
    """A picture's numbers in 0..1; "RGB" gives (H, W, 3), "L" (H, W)."""
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.asarray(picture.convert(mode), np.float32) / 255)
    except (OSError, ValueError) as problem:
        raise ValueError(f"names {path}, which is no picture that can be read ({problem})") from None


def read_own(path, clip):
    """The :class:`Own` pictures of a manifest. Raises ValueError, which names the entry and what it lacks."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} cannot be read as JSON ({problem}); --data takes a list of pictures.") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path} holds no list of pictures; see bench dynamic-prompt --help.")
    found = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(_own(path.parent, entry, clip, number))
        except ValueError as problem:
            raise ValueError(f"Entry {number} of {path.name} {problem}.") from None
    return found


def _own(folder, entry, clip, number):
    wanted = {"picture": str, "caption": str, "masks": list}
    lacks = [n for n, kind in wanted.items() if not isinstance(entry, dict) or not isinstance(entry.get(n), kind)]
    if lacks or not all(isinstance(mask, str) for mask in entry["masks"]):
        raise ValueError(f"needs a path as picture, a text as caption and a list of paths as masks, not {entry!r:.120}")
    picture = opened(folder / entry["picture"], "RGB")
    height, width = picture.shape[:2]
    if height % 8 or width % 8:
        raise ValueError(f"has a picture of {width}x{height}, but both sides must be multiples of 8; resize it")
    try:
        caption, nouns = patches.read_nouns(clip, entry["caption"], f"the caption of entry {number}")
    except ValueError as problem:
        raise ValueError(f"has a caption that cannot be used: {str(problem).rstrip('.')}") from None
    if len(nouns) < 2 or len(nouns) != len(entry["masks"]):
        raise ValueError(
            f"has {len(nouns)} nouns in braces and {len(entry['masks'])} masks, but needs at least two nouns and one "
            "mask of each"
        )
    masks = [opened(folder / mask, "L") for mask in entry["masks"]]
    for name, mask in zip(entry["masks"], masks, strict=True):
        if mask.shape != picture.shape[:2]:
            size = f"{mask.shape[1]}x{mask.shape[0]}"
            raise ValueError(f"has the mask {name} of {size}, but a picture of {width}x{height}; make them alike")
        if not 0 < float((mask > 0.5).float().mean()) < 1:
            raise ValueError(f"has the mask {name} that is all black or all white; paint the noun's place white")
    return Own(picture, caption, [at for _, at in nouns], torch.stack(masks))


def own_batches(bench, pictures, size):
    """Batches of neighbours in the list that have the picture's size and the numbers of nouns and tokens in common."""

    def kind(one):
        return one.picture.shape, [len(at) for at in one.nouns]

    done = 0
    for _, alike in itertools.groupby(pictures, kind):
        alike = list(alike)
        for first in range(0, len(alike), size):
            part = alike[first : first + size]
            captions, together = [one.caption for one in part], torch.stack([one.picture for one in part])
            text = bench.text(*captions)
            trajectory = bench.invert(bench.encode(together), text)[0]
            nouns, masks = [one.nouns for one in part], [one.masks for one in part]
            yield with_background(bench, Batch([], captions, nouns, together, masks, trajectory), text)
            done += len(part)
            log.info("%d of %d pictures", done, len(pictures))


def token_maps(bench, text, path, sigmas, count):
    """Maps (T, B, h, w) of the first T = ``count`` tokens along a path of latents, and the self-attention's mean."""
    words = maps.MapSum([(i,) for i in range(count)])
    parts = self_maps.SelfSum(path.shape[1])

    def receive(place, own, heads):
        (parts if place.kind == "self" else words).add(place, own, heads)

    def body(denoise, start, report):
        for step, sigma in enumerate(map(float, sigmas[:-1])):
            if parts.grid is None:
                denoise(path[step].to(start), sigma)
                parts.choose(1024)
                words.sums.clear()
            denoise(path[step].to(start), sigma)

    picture = host.to_host_scale(bench.model, path[-1])
    host.walk(patches.recording(bench.model, receive), text, picture, sigmas, body)
    return words.level(LEVEL), parts


STATISTICS = {  # name -> at which x and sigma, and every how many steps, attention is added up
    "own levels, every 5th step": (as_drawn, 5),
    "own levels, every step": (as_drawn, 1),
    "while inverting, every step": (as_asked, 1),
    "while inverting, every 5th step": (as_asked, 5),
}


def background_masks(bench, count, settings, size):
    """IoU of the background that Attune Background Mask finds with the true one, by the attention it is read from; and
    beside the first of these the mean difference with its 95 % interval (10,000 resamplings of the scenes)."""
    rows, generator = {name: [] for name in STATISTICS}, torch.Generator().manual_seed(0)
    for scene in draw_scenes(count, bench.seed, MASKS):
        picture, masks = scenes.render(scene)
        caption = scenes.caption(scene)
        trajectory = bench.invert(bench.encode(torch.from_numpy(picture)[None]), bench.text(caption))[0]
        trajectory = replace(trajectory, conditioning=bench.text(caption))
        braced = caption
        for thing in scene.things:
            braced = braced.replace(f" {thing.shape}", f" {{{thing.shape}}}", 1)
        truth = torch.from_numpy(masks.max(0)) < 0.5
        for name, (at, every) in STATISTICS.items():
            chosen = {as_drawn: AS_DRAWN, as_asked: AS_INVERTED}[at]
            found = call(AttuneBackgroundMask, bench.model, bench.clip, trajectory, braced, AGREEMENT, CLUSTERS, 1024,
                         LEVEL, every, 0, chosen)[0][0] > 0.5  # fmt: skip
            rows[name].append(float((found & truth).sum() / (found | truth).sum()))
    rows = {name: torch.tensor(values) for name, values in rows.items()}
    first, out = next(iter(rows.values())), {}
    for name, values in rows.items():
        gain = values - first
        drawn = gain[torch.randint(len(gain), (10000, len(gain)), generator=generator)].mean(1)
        out[name] = {
            "IoU": round(float(values.mean()), 4),
            "worst": round(float(values.min()), 4),
            "above the first": round(float(gain.mean()), 4),
            "95 % interval": [round(float(q), 4) for q in drawn.quantile(torch.tensor([0.025, 0.975]))],
        }
        log.info("%s: %s", name, out[name])
    return out


def prepare(bench, drawn, colours=False):
    """A :class:`Batch`: inverted, its nouns found, and its background estimated. With ``colours`` the colour before a
    noun belongs to it."""
    rendered = [scenes.render(s) for s in drawn]
    pictures = torch.from_numpy(np.stack([p for p, _ in rendered]))
    captions = [scenes.caption(s) for s in drawn]
    text = bench.text(*captions)
    trajectory = bench.invert(bench.encode(pictures), text)[0]
    read = [patches.read_words(bench.clip, caption) for caption in captions]
    nouns = [
        [(word.positions if not colours else before.positions + word.positions)
         for before, word in itertools.pairwise(one.words) if word.text in scenes.SHAPES]
        for one in read
    ]  # fmt: skip
    masks = [torch.from_numpy(m) for _, m in rendered]
    return with_background(bench, Batch(drawn, captions, nouns, pictures, masks, trajectory), text)


def with_background(bench, batch, text):
    """The batch with where its nouns look along its trajectory, and what each must not look at."""
    trajectory = batch.trajectory
    found, parts = token_maps(bench, text, trajectory.latents, trajectory.sigmas, batch.tokens)
    batch.seen = of_nouns(batch, found)
    for matrix, mine in zip(parts.average(), batch.seen, strict=True):
        labels = self_maps.clusters(matrix, CLUSTERS)
        owners, _ = background.owners(background.agreement(mine, labels, parts.grid, CLUSTERS), AGREEMENT)
        found = background.masks(labels, owners, len(mine), parts.grid, mine.shape[1:]).flatten(1)
        batch.outside += background.forbidden(found[:1], None, len(mine), 1)
        batch.others += background.forbidden(found[:1], found[1:], len(mine), 1)
    return batch


def of_nouns(batch, found):
    """(B, W, h, w) of maps (T, B, h, w)."""
    return torch.stack(
        [torch.stack([found[list(at), i].sum(0) for at in nouns]) for i, nouns in enumerate(batch.nouns)]
    )


def learn(bench, batch, settings, nulls=None, by_masks=False):
    """The :class:`dynamic_prompt.Progress` of all pictures of a batch, each under its own caption; ``by_masks`` keeps
    each noun to its own parts of the picture."""
    level = patches.LevelMaps(bench.model, LEVEL, batch.trajectory.latents.shape[-2:])
    flat = [[p for at in nouns for p in at] for nouns in batch.nouns]
    vectors = [patches.token_vectors(bench.clip, c, at) for c, at in zip(batch.captions, flat, strict=True)]
    start = {name: torch.stack([v[name] for v in vectors]) for name in vectors[0]}

    def encode(picture, own):
        rows = {name: dict(zip(flat[picture], v, strict=True)) for name, v in own.items()}
        return patches.encode_tokens(bench.clip, patches.with_vectors(bench.clip, batch.captions[picture], rows))

    texts = bench.text(*batch.captions), bench.text("")
    task = dynamic_prompt.Task(batch.nouns, batch.others if by_masks else batch.outside, level.grid)
    trajectory = replace(batch.trajectory, conditioning=texts[0])
    done = unfinished.learn_words(
        level.model, bench.clip, trajectory, texts, start, task, encode, level.read, settings, nulls
    )
    return done, level.grid


def learned_maps(bench, batch, settings, by_masks=False):
    """(B, W, h, w): where the nouns look once they are learned, the mean of all steps."""
    # Of the demo's scenes nothing is computed again, as memory is no concern there; the figures are the same.
    free = mock.patch.object(gradient, "checkpointed", lambda *_: contextlib.nullcontext())
    with free if batch.scenes else contextlib.nullcontext():
        done, grid = learn(bench, batch, settings, by_masks=by_masks)
    return done.seen[1].unflatten(-1, grid).cpu() / len(done)


# ---- figure 5(a) -------------------------------------------------------------------------------------------------


def overlaps(batch, seen):
    """(B, thresholds): the mean IoU over a picture's nouns of their maps (B, W, h, w), divided by their greatest value,
    above each threshold, with the true masks."""
    rows = []
    for mine, masks in zip(seen, batch.masks, strict=True):
        rows.append(iou_curve(maps.resize(mine, masks.shape[1:]), masks > 0.5, THRESHOLDS))
    return torch.stack(rows)


def summary(curves):
    """Of name -> (scenes, thresholds): the best mean IoU and its threshold; and beside null-text, each method at its
    own best threshold, the mean difference and its 95 % interval (10,000 resamplings of the scenes)."""
    out, at = {}, {name: int(rows.mean(0).argmax()) for name, rows in curves.items()}
    generator = torch.Generator().manual_seed(0)
    base = curves[NULL_TEXT][:, at[NULL_TEXT]]
    for name, rows in curves.items():
        gain = rows[:, at[name]] - base
        drawn = gain[torch.randint(len(gain), (10000, len(gain)), generator=generator)].mean(1)
        out[name] = {
            "best IoU": round(float(rows[:, at[name]].mean()), 4),
            "threshold": round(float(THRESHOLDS[at[name]]), 2),
            "above null-text": round(float(gain.mean()), 4),
            "95 % interval": [round(float(q), 4) for q in drawn.quantile(torch.tensor([0.025, 0.975]))],
            "scenes that gain": round(float((gain > 0).float().mean()), 2),
        }
    return out


DDIM, NULL_TEXT, ALL, MASKED = "DDIM", "null-text", "all three losses", "all three, noun masks"
CONSTANT, NEVER = "all three, constant thresholds", "all three, no thresholds"
SINGLE = "all three, one vector for all steps"


def masked(settings):
    """For nouns that are kept to masks, which the paper does not do: that takes a stronger loss, and stands larger
    updates, since a noun cannot settle on the other's object."""
    return replace(settings, background=1.0, rate=3 * settings.rate)


def variants(settings, wanted):
    """Name -> settings, and whether nouns are kept to masks."""
    off = {"balance": 0.0, "disjoint": 0.0, "background": 0.0}
    alone = {f"{name} alone": replace(settings, **{**off, name: getattr(settings, name)}) for name in off}
    every = {name: (one, False) for name, one in alone.items()}
    every |= {ALL: (settings, False), MASKED: (masked(settings), True)}
    every[CONSTANT] = replace(settings, alpha=(1e9,) * 3), False
    every[NEVER] = replace(settings, beta=(0.0,) * 3), False
    every[SINGLE] = replace(settings, shared=True), False
    return {name: one for name, one in every.items() if not wanted or name in wanted}


def batches(bench, count, seed, which, size, colours=False):
    drawn = draw_scenes(count, seed, which)
    for first in range(0, count, size):
        yield prepare(bench, drawn[first : first + size], colours)
        log.info("%d of %d scenes", min(first + size, count), count)


def curve(bench, count, settings, size, wanted=(), own=()):
    """Null-text's maps are those along the trajectory, which is where its drawing goes; DDIM's those along drawing
    under guidance without it. ``own`` are a user's pictures, instead of the demo's scenes."""
    rows = {}
    for batch in own_batches(bench, own, size) if own else batches(bench, count, bench.seed, TEST, size):
        text, sigmas = bench.text(*batch.captions), batch.trajectory.sigmas
        trajectory = replace(batch.trajectory, conditioning=text)
        path = host.draw_again(bench.model, trajectory, bench.text(""), bench.guidance)
        seen = of_nouns(batch, token_maps(bench, text, path, sigmas, batch.tokens)[0])
        rows.setdefault(DDIM, []).append(overlaps(batch, seen))
        rows.setdefault(NULL_TEXT, []).append(overlaps(batch, batch.seen))
        for name, variant in variants(settings, wanted).items():
            rows.setdefault(name, []).append(overlaps(batch, learned_maps(bench, batch, *variant)))
            log.info("%s: best %.3f", name, float(torch.cat(rows[name]).mean(0).max()))
    rows = {name: torch.cat(parts) for name, parts in rows.items()}
    kinds = {
        kind: {name: part[number :: len(KINDS)] for name, part in rows.items()} for number, kind in enumerate(KINDS)
    }
    kinds = {} if own else kinds
    shown = {name: [round(float(v), 3) for v in part.mean(0)[::5]] for name, part in rows.items()}
    return {
        "all": summary(rows),
        **{kind: summary(part) for kind, part in kinds.items()},
        "thresholds": [round(float(t), 2) for t in THRESHOLDS[::5]],
        "IoU": shown,
    }, {name: part.mean(0).tolist() for name, part in rows.items()}


INKS = (
    (161, 161, 170), (255, 255, 255), (250, 204, 21), (96, 165, 250), (244, 114, 182), (251, 146, 60), (74, 222, 128),
)  # fmt: skip


def draw_curves(curves, path, width=640, height=400):
    """Curves, name -> values of 0 to 1 at evenly spaced thresholds from 0 to 1, as a picture."""
    picture = Image.new("RGB", (width, height), (24, 24, 27))
    pen, left, top, right, bottom = ImageDraw.Draw(picture), 40, 10, width - 10, height - 30
    highest = max(max(values) for values in curves.values()) * 1.05
    for i in range(6):
        y, x = bottom - i / 5 * (bottom - top), left + i / 5 * (right - left)
        pen.line((left, y, right, y), (63, 63, 70))
        pen.text((6, y - 6), f"{i / 5 * highest:.2f}", (228, 228, 231))
        pen.text((x - 8, bottom + 8), f"{i / 5:.1f}", (228, 228, 231))
    for number, ((name, values), ink) in enumerate(zip(curves.items(), INKS, strict=False)):
        xs = [left + i / (len(values) - 1) * (right - left) for i in range(len(values))]
        ys = [bottom - v / highest * (bottom - top) for v in values]
        pen.line(list(zip(xs, ys, strict=True)), ink, 2)
        pen.text((right - 130, top + 6 + 14 * number), name, ink)
    picture.save(path)


def table(found):
    """Markdown: for each method the IoU at thresholds 0 to 1, its best, and what it gains."""
    lines = ["| maps | " + " | ".join(f"{t:g}" for t in found["thresholds"]) + " | best | above null-text |"]
    lines.append("|" + "---|" * (len(found["thresholds"]) + 3))
    for name, values in found["IoU"].items():
        own = found["all"][name]
        low, high = own["95 % interval"]
        gain = "" if name == NULL_TEXT else f"{own['above null-text']:+.3f} ({low:+.3f} to {high:+.3f})"
        cells = " | ".join(f"{v:.2f}" for v in values)
        lines.append(f"| {name} | {cells} | {own['best IoU']:.3f} | {gain} |")
    return "\n".join(lines)


# ---- settings ----------------------------------------------------------------------------------------------------


def tune(bench, count, settings, size):
    """Best mean IoU by learning rate, and at the best of these by the number of looks and by weights."""
    ready = list(batches(bench, count, bench.seed, TUNING, size))
    rows = {NULL_TEXT: torch.cat([overlaps(b, b.seen) for b in ready])}

    def score(name, one, by_masks=False):
        begun = time.perf_counter()
        rows[name] = torch.cat([overlaps(b, learned_maps(bench, b, one, by_masks)) for b in ready])
        log.info("%s: %.4f, %.0f s", name, float(rows[name].mean(0).max()), time.perf_counter() - begun)
        return float(rows[name].mean(0).max())

    scores = {rate: score(f"rate {rate:g}", replace(settings, rate=rate)) for rate in RATES}
    best = replace(settings, rate=max(scores, key=scores.get))
    score(f"rate {best.rate:g}, {2 * best.inner} looks", replace(best, inner=2 * best.inner))
    score(MASKED, masked(best), by_masks=True)
    weights = {"disjoint, background 0.2": (0.2, 0.2), "disjoint, background 1": (1.0, 1.0)}
    for name, (disjoint, behind) in weights.items():
        score(f"{name} at rate {best.rate:g}", replace(best, disjoint=disjoint, background=behind))
    return summary(rows)


# ---- table 1 -----------------------------------------------------------------------------------------------------

SWAPPED = {"two colours": "color", "two shapes": "shape"}


def exchanged(source, what, rng):
    """The scene with both objects' colour or shape exchanged for one that is not in it."""
    names = scenes.COLORS if what == "color" else scenes.SHAPES
    used = {getattr(t, what) for t in source.things} | {source.background}
    fresh = rng.permutation([name for name in names if name not in used])
    for i in range(2):
        source = scenes.edit_thing(source, i, **{what: str(fresh[i])})
    return source


def swap(bench, count, settings, size, cross=0.8, self_=0.4):
    """Two words exchanged at once: success, dB outside the objects against the source, and dB and SSIM against the true
    edited picture; everything against the autoencoder's own pictures. Learned are the nouns with their colours."""
    rng, marks, shown = np.random.default_rng([bench.seed, 17]), {}, []
    nulls = NullText(bench.guidance)
    for batch in batches(bench, count, bench.seed, SWAPS, size, colours=True):
        plain = replace(batch.trajectory, conditioning=bench.text(*batch.captions))
        null_text = call(invert.AttuneNullTextInversion, plain, bench.model, bench.text(""), bench.guidance,
                         nulls.inner, nulls.rate, nulls.tolerance, nulls.warm)[0]  # fmt: skip
        ways = {
            ALL: learn(bench, batch, settings, nulls)[0],
            MASKED: learn(bench, batch, masked(settings), nulls, by_masks=True)[0],
        }
        for i, scene in enumerate(batch.scenes):
            one = alone(bench, batch, i)
            methods = {NULL_TEXT: replace(one, nulls=null_text.nulls[:, i : i + 1].clone())}
            methods |= {name: with_words(one, batch, i, done) for name, done in ways.items()}
            source = host.decode(bench.vae, one, one.latents[-1])[0]
            for name, what in SWAPPED.items():
                goal = exchanged(scene, what, rng)
                truth = bench.decode(bench.encode(torch.from_numpy(scenes.render(goal)[0])[None]))[0]
                shown += [source, truth]
                for method, trajectory in methods.items():
                    prompts = batch.captions[i], scenes.caption(goal)
                    made = call(edit.AttunePromptSwap, bench.model, bench.clip, trajectory, *prompts, 0.0, cross, 0.0,
                                self_, 1024)  # fmt: skip
                    shown.append(drawn(bench, *made, trajectory))
                    row = mark(shown[-1], goal, what, source, truth, batch.masks[i])
                    marks.setdefault(name, {}).setdefault(method, []).append(row)
    sheet.rows_of([sheet.to_pil(p) for p in shown[: 10 * 12]], 10).save(RUN / "dynamic_prompt_swap.png")
    keys = ("both right", "one right, mean", "outside dB", "against the truth dB", "SSIM with the truth")
    return {
        name: {m: dict(zip(keys, np.mean(rows, 0).round(3).tolist(), strict=True)) for m, rows in found.items()}
        for name, found in marks.items()
    }


def alone(bench, batch, number):
    """One picture's trajectory."""
    trajectory = batch.trajectory
    return replace(
        trajectory, latents=trajectory.latents[:, number : number + 1], negative=bench.text(""),
        header=host.describe_model(bench.model), windows=host.windows(bench.model, trajectory.sigmas),
    )  # fmt: skip


def with_words(one, batch, number, done):
    """One picture's trajectory with what was learned for it."""
    at = slice(number, number + 1)
    vectors = {n: torch.stack([v[n][at] for v in done.vectors]).float() for n in done.vectors[0]}
    words = tuple(t.shape for t in batch.scenes[number].things)
    learned = LearnedWords(batch.captions[number], words, tuple(batch.nouns[number]), vectors)
    return replace(one, nulls=torch.stack([n[at] for n in done.nulls]).float(), learned=learned)


def drawn(bench, model, positive, trajectory):
    """The picture (H, W, 3) that a stock sampler draws."""
    noise, negative = {"samples": host.host_latent(trajectory, 0)}, negative_of(trajectory)
    return bench.sample(model, positive, bench.guidance, trajectory.sigmas, noise, negative)[0].clamp(0, 1)


def mark(picture, goal, what, source, truth, masks):
    """Both right, the share that is, dB outside both pictures' objects, dB and SSIM with the truth. ``masks`` (2, H, W)
    are the source's."""
    right = [told(picture, thing, what, mask) for thing, mask in zip(goal.things, masks, strict=True)]
    either = torch.cat([masks, torch.from_numpy(scenes.render(goal)[1])]).amax(0)
    off = torch.nn.functional.max_pool2d(either[None], 9, 1, 4)[0] == 0
    outside = decibels((picture - source).square()[off][None])
    whole = decibels((picture - truth).square()[None])
    return all(right), float(np.mean(right)), outside, whole, structural_similarity(picture[None], truth[None])


def told(picture, thing, what, mask):
    """Whether a picture shows an object's new colour in its old place, or its new shape on what stands there."""
    if what == "color":
        return checker.color_of(picture[mask > 0.99].numpy()) == thing.color
    _, found = checker.look(picture.numpy())
    there = [(one.mask & (mask > 0.5).numpy()).sum() for one in found]
    return bool(found) and max(there) > 0 and found[int(np.argmax(there))].shape == thing.shape


# ---- speed -------------------------------------------------------------------------------------------------------

REFERENCE = "as the authors' code"


def speed(bench, count, settings, size):
    """Beside the schedule of the authors' code: up to 21 looks at the words, and 51 updates of the null embedding from
    the empty text on, with no early stop of these."""
    papers = replace(settings, inner=21)
    ways = {
        REFERENCE: (papers, NullText(bench.guidance, 51, 0.01, -1.0, False)),
        "Attune's defaults": (papers, NullText(bench.guidance)),
        f"{settings.inner} looks, 10 null updates": (settings, NullText(bench.guidance)),
        f"{settings.inner} looks, 5 null updates at twice the rate": (settings, NullText(bench.guidance, 5, 0.02)),
    }
    rows = {}
    for batch in batches(bench, count, bench.seed, SPEED, size):
        for name, (words, nulls) in ways.items():
            with Clock(bench.model.model.diffusion_model).running() as clock:
                done, grid = learn(bench, batch, words, nulls)
            seen = done.seen[1].unflatten(-1, grid).cpu() / len(done)
            windows = host.windows(bench.model, batch.trajectory.sigmas)
            texts = [texts_of(bench, batch, done, step) for step in range(len(done))]
            positive = step_conditioning(texts, windows, {})
            again = replace(
                batch.trajectory, conditioning=positive, negative=bench.text(""), nulls=torch.stack(done.nulls).float(),
                windows=windows,
            )  # fmt: skip
            path = host.draw_again(bench.model, again, negative_of(again), bench.guidance)
            back = host.decode(bench.vae, again, path[-1])
            row = rows.setdefault(
                name, {"IoU": [], "PSNR dB": [], "gradient rows": [], "other rows": [], "seconds": []}
            )
            row["IoU"].append(overlaps(batch, seen).mean(0))
            row["PSNR dB"].append(psnr(back, batch.pictures))
            row["gradient rows"].append(clock.rows["with gradient"] / len(batch.scenes))
            row["other rows"].append((clock.rows["no gradient"] + clock.rows["computed again"]) / len(batch.scenes))
            row["seconds"].append(clock.total / len(batch.scenes))
            log.info("%s: %s", name, {k: v[-1] for k, v in row.items() if k != "IoU"})
    mean = {n: {k: round(float(np.mean(v)), 3) for k, v in row.items() if k != "IoU"} for n, row in rows.items()}
    for name, row in rows.items():
        mean[name]["best IoU"] = round(float(torch.stack(row["IoU"]).mean(0).max()), 4)
        for kind in ("gradient rows", "seconds"):
            mean[name][f"{kind}, times fewer"] = round(mean[REFERENCE][kind] / mean[name][kind], 2)
    return {**mean, "memory": memory(bench)}


def texts_of(bench, batch, done, step):
    """(B, T, C): the captions with what was learned for a step."""
    texts = []
    for i, (caption, nouns) in enumerate(zip(batch.captions, batch.nouns, strict=True)):
        at = [p for positions in nouns for p in positions]
        rows = {n: dict(zip(at, v[i].cpu(), strict=True)) for n, v in done.vectors[step].items()}
        texts.append(bench.clip.encode_from_tokens(patches.with_vectors(bench.clip, caption, rows)))
    return torch.cat(texts)


def memory(bench, side=64):
    """Peak bytes of a look at the words with its gradient beside a guided sampling step, for side x side latents."""
    caption, nouns = "a red circle and a blue square on a gray background", [(3,), (7,)]
    text, empty = bench.text(caption), bench.text("")
    picture = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(bench.seed))
    level = patches.LevelMaps(bench.model, LEVEL, (side, side))
    peaks = {}

    def sampling(denoise, start, report):
        denoise(start, 2.0)
        with LiveBytes() as live:
            denoise(start, 2.0)
        peaks["guided sampling step"] = live.peak

    def learning(network, start, report):
        rows = torch.arange(1)
        leaf = text[0][0].clone().float().requires_grad_()
        for _ in range(2):  # the first tells how much may be kept
            with LiveBytes() as live, torch.enable_grad():
                seen = level.read(lambda: network.denoise(start, 2.0, leaf, rows, "positive"))
                parts = dynamic_prompt.losses(DynamicPrompt(), seen[0], nouns, None, level.grid)
                sum(parts.values()).backward()
        peaks["look with its gradient"] = live.peak

    host.walk(bench.model, text, picture, torch.tensor([2.0, 1.5]), sampling, empty, bench.guidance)
    host.learn(level.model, text, empty, picture, 1, learning)
    weights = sum(p.numel() * p.element_size() for p in bench.model.model.diffusion_model.parameters())
    step, update = peaks["guided sampling step"], peaks["look with its gradient"]
    return {
        "latent": [side, side],
        "ratio of activations": round(update / step, 2),
        "ratio with weights": round((update + weights) / (step + weights), 2),
    }


# ---- the command -------------------------------------------------------------------------------------------------

PARTS = {
    "background": (background_masks, 48), "tune": (tune, 40), "curve": (curve, 60), "swap": (swap, 18),
    "speed": (speed, 4),
}  # fmt: skip


def keep_own(args, found, lines):
    """What came of a user's pictures, beside the demo's own runs and not among the figures of the pack."""
    where = f"{args.data.stem}{f'_{args.checkpoint.stem}' if args.checkpoint else ''}"
    kept = RUN / f"dynamic_prompt_{where}.json"
    RUN.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=2) + "\n")
    draw_curves(lines, kept.with_suffix(".png"))
    log.info("%s\n\nkept in %s and as a picture beside it", table(found), kept)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    counts = ", ".join(f"{count} for {part}" for part, (_, count) in PARTS.items())
    parser.add_argument("--count", type=int, help=f"scenes ({counts})")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="scenes at a time; 12, or 1 of your own pictures")
    parser.add_argument("--rate", type=float, help=f"0.01, or the papers' {PAPERS_RATE:g} of a checkpoint")
    parser.add_argument("--looks", type=int, default=5, help="inner steps")
    parser.add_argument("--disjoint", type=float, default=0.05)
    parser.add_argument("--background", type=float, default=0.05)
    parser.add_argument("--only", nargs="*", default=(), help="of the curves: these of the learned ones")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of another demo model")
    parser.add_argument("--checkpoint", type=Path, help="a Stable Diffusion 1.x checkpoint; goes with --data")
    parser.add_argument("--data", type=Path, help="a list of your own pictures, of the curve; see above")
    args = parser.parse_args()
    if (args.checkpoint and not args.data) or (args.data and args.part != "curve"):
        parser.error("--checkpoint needs pictures of your own, --data, which only the curve takes.")
    real = args.checkpoint and not is_demo(args.checkpoint)
    args.rate = args.rate or (PAPERS_RATE if real else 0.01)
    args.batch = args.batch or (1 if args.data else 12)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    measure, count = PARTS[args.part]
    count, name = args.count or count, args.part
    settings = DynamicPrompt(rate=args.rate, inner=args.looks, disjoint=args.disjoint, background=args.background)
    with torch.inference_mode():
        bench = Bench(count, args.seed, args.steps, args.guidance, args.checkpoint)
        if args.weights != WEIGHTS:
            bench.model, bench.clip, bench.vae = load_demo(args.weights)
            name += f", {args.weights.stem}"
        own = read_own(args.data, bench.clip)[: args.count] if args.data else []
        count = len(own) or count
        extra = [args.only, own] if args.part == "curve" else []
        found = measure(bench, count, settings, args.batch, *extra)
    found, lines = found if args.part == "curve" else (found, None)
    used = {"scenes": count, "steps": args.steps, "guidance": args.guidance, "seed": args.seed} | asdict(settings)
    found = {"settings": used} | found
    log.info("%s: %s", name, json.dumps(found, indent=2))
    if own:
        keep_own(args, found, lines)
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {name: found}, indent=2) + "\n")
    if lines:
        log.info("%s", table(found))
        draw_curves(lines, RESULTS.with_name(name.replace(", ", "_").replace("curve", "dynamic_prompt") + ".png"))


if __name__ == "__main__":
    main()
