"""Free-Prompt-Editing and MasaCtrl beside their papers' procedures on diffusers. Run as ``dev.py bench self-parity``.

Same weights, same noise, same choices: each held-out picture is inverted, or drawn from its caption and recorded, each
edit is drawn by the pack's nodes and the stock sampler, and again by :mod:`reference_self`. Every figure is printed,
and kept in benchmark/editing.json.

    cases           how far the last latents and the pictures lie apart, beside what the edit itself changes
    differences     where the pack departs from the authors' code on purpose, and by how much
    the source row  a source row that runs freely, as MasaCtrl's code leaves it, beside the pinned one
"""

import argparse
import functools
import logging
from dataclasses import dataclass, replace

import comfy.utils
import torch

from ..demo import scenes
from ..demo.measure import Bench, call
from ..inversion import ddim, host
from ..inversion.report import decibels, psnr
from ..inversion.trajectory import negative_of
from ..nodes import invert, self_attention
from . import cost, editing_parity
from . import reference_self as paper
from .editing_parity import rounded, table
from .inversion import GRIDS, relative

FPE, MUTUAL = "Free-Prompt-Editing", "MasaCtrl"
NODES = {FPE: "AttuneFreePromptEditing", MUTUAL: "AttuneMutualSelfAttention"}
REAL, DRAWN, LEARNED = "inverted", "drawn from its caption", "inverted, with null-text embeddings"
DEFAULTS = {
    FPE: {"start": 0.0, "end": 0.8, "token_limit": 1024, "layers": ""},
    MUTUAL: {
        "start": 0.08, "end": 1.0, "layer": 10, "source_words": "", "target_words": "", "threshold": 0.1,
        "source_mask": None, "target_mask": None, "layers": "", "steps": "", "reads": self_attention.SOURCE,
    },
}  # fmt: skip
log = logging.getLogger("attune.bench")


@dataclass(frozen=True)
class Case:
    """One edit, as both sides are told it. ``changed`` holds what is not as in :data:`DEFAULTS`, as pairs."""

    method: str
    target: str
    changed: tuple = ()
    source: str = ""
    picture: str = REAL
    grid: str = host.HOST_GRID
    size: tuple = (16, 16)  # of the latent (h, w), for drawn pictures

    @property
    def settings(self):
        return DEFAULTS[self.method] | dict(self.changed)


@functools.cache
def cases(scene):
    """Name -> :class:`Case`, for a scene of two objects. The first changes its colour, for MasaCtrl its shape."""
    thing, other = scene.things
    used = {thing.color, other.color, scene.background}
    color = next(c for c in scenes.COLORS if c not in used)
    shape = next(s for s in scenes.SHAPES if s not in (thing.shape, other.shape))
    reshaped = scenes.edit_thing(scene, 0, shape=shape)
    source, colored, shaped = map(scenes.caption, (scene, scenes.edit_thing(scene, 0, color=color), reshaped))
    soft = [torch.from_numpy(scenes.render(s)[1][:1]) for s in (scene, reshaped)]
    hard = [(mask > 0.5).float() for mask in soft]
    thin = torch.zeros_like(hard[0])
    thin[:, 44:46] = 1  # between the pixels that nearest resizing looks at, at every level

    def fpe(picture=REAL, grid=host.HOST_GRID, **changed):
        return Case(FPE, colored, tuple(changed.items()), "" if picture == REAL else source, picture, grid)

    def mutual(picture=REAL, size=(16, 16), **changed):
        return Case(MUTUAL, shaped, tuple(changed.items()), "" if picture == REAL else source, picture, size=size)

    gray = torch.full_like(thin, 0.4)
    gray[..., :64] = 0.6  # tokens of one value each at every level
    words = {"source_words": thing.shape, "target_words": shape}
    union = {"reads": self_attention.JOINT}
    return {
        "FPE": fpe(),
        "FPE, at most 64 tokens": fpe(token_limit=64),
        "FPE, layers 4-14": fpe(layers="4-14"),
        "FPE, until 0.4": fpe(end=0.4),
        "FPE, from 0.2 to 0.6, other layers": fpe(start=0.2, end=0.6, layers="2, 9-12"),
        "FPE, drawn picture": fpe(DRAWN),
        "FPE, null-text embeddings": fpe(LEARNED),
        "FPE, the papers' timesteps": fpe(grid=host.PAPERS_GRID),
        "MasaCtrl": mutual(),
        "MasaCtrl, from 0.2 to 0.8 and layer 6": mutual(start=0.2, end=0.8, layer=6),
        "MasaCtrl, drawn picture": mutual(DRAWN),
        "MasaCtrl, masks": mutual(source_mask=hard[0], target_mask=hard[1]),
        "MasaCtrl, soft masks": mutual(source_mask=soft[0], target_mask=soft[1]),
        "MasaCtrl, a thin mask": mutual(source_mask=thin, target_mask=hard[1]),
        "MasaCtrl, an empty source mask": mutual(source_mask=torch.zeros_like(thin), target_mask=hard[1]),
        "MasaCtrl, drawn picture, masks": mutual(DRAWN, source_mask=hard[0], target_mask=hard[1]),
        "MasaCtrl, drawn picture, masks of words": mutual(DRAWN, **words),
        "MasaCtrl, wide picture, masks": mutual(DRAWN, (16, 24), source_mask=soft[0], target_mask=soft[1]),
        "MasaCtrl, wide picture, masks of words": mutual(DRAWN, (16, 24), **words),
        "MasaCtrl, source mask, target words": mutual(source_mask=hard[0], target_words=shape, threshold=0.3),
        "MasaCtrl, chosen layers and steps": mutual(layers="2, 6-14", steps="1, 3-99"),
        "MasaCtrl, union": mutual(**union),
        "MasaCtrl, union, masks": mutual(source_mask=hard[0], target_mask=hard[1], **union),
        "MasaCtrl, drawn picture, union, masks of words": mutual(DRAWN, **words, **union),
        "MasaCtrl, a source mask of grays": mutual(source_mask=gray, target_mask=hard[1]),
    }


# ---- the two sides -----------------------------------------------------------------------------------------------


class Sides(editing_parity.Sides):
    """As :class:`editing_parity.Sides`, with these methods and with real pictures."""

    def __init__(self, bench):
        super().__init__(bench)
        self.invert = functools.cache(self.invert)

    def record(self, caption, grid, seed, size):
        """The trajectory of a picture with latents of ``size`` (h, w), drawn from a caption at the bench's guidance."""
        sigmas, blank = host.schedule(self.bench.model, self.bench.steps, grid), torch.zeros(1, 4, *size)
        settings = True, seed, self.bench.guidance, self.bench.text(caption), self.empty, self.euler, sigmas
        return call(invert.AttuneRecordTrajectory, self.bench.model, *settings, {"samples": blank})[0]

    def invert(self, number, caption, grid, learned):
        """The trajectory of the held-out picture ``number``."""
        latent = self.bench.encode(self.bench.scenes(objects=2)[1][number : number + 1])
        settings = self.bench.steps, grid, ddim.LATER
        trajectory = call(invert.AttuneDDIMInversion, self.bench.model, latent, self.bench.text(caption), *settings)[0]
        if learned:
            settings = self.empty, self.bench.guidance, 10, 0.01, 1e-5, True
            trajectory = call(invert.AttuneNullTextInversion, trajectory, self.bench.model, *settings)[0]
        return trajectory

    def trajectory(self, case, number):
        """The picture that a case edits: the held-out scene ``number``."""
        if case.picture == DRAWN:
            return self.record(case.source, case.grid, self.bench.seed + number, case.size)
        return self.invert(number, case.source, case.grid, case.picture == LEARNED)

    def ours(self, case, trajectory):
        """The last latent (1, 4, h, w) that the pack's node and the stock sampler draw."""
        prompts = {"source_prompt": case.source, "target_prompt": case.target}
        node, given = getattr(self_attention, NODES[case.method]), prompts | case.settings
        model, positive = call(node, self.bench.model, self.bench.clip, trajectory, **given)
        negative = self.empty if trajectory.nulls is None else negative_of(trajectory)
        return self.drawn(model, positive, negative, trajectory)

    def theirs(self, case, trajectory, quirk=False, pinned=True, plain=False):
        """The paper's last latents (1, 4, h, w), source and target; with ``plain``, of drawing without an edit."""
        path = trajectory.latents / (1 + trajectory.sigmas**2).sqrt().view(-1, 1, 1, 1, 1)
        texts = self.prompt(case.source).embedding, self.prompt(case.target).embedding
        nulls = self.empty[0][0][None] if trajectory.nulls is None else trajectory.nulls
        method = paper.Nothing() if plain else self.method(case, quirk)
        settings = nulls, self.bench.guidance, self.bench.steps, method, path if pinned else None
        latents = paper.draw(self.network, GRIDS[case.grid], path[0], *texts, *settings)
        # Without the papers' last step, which is onto itself: the pack does not take it.
        return latents[len(path) - 1].split(1)

    def method(self, case, quirk):
        given = case.settings
        steps = tuple(int(given[end] * self.bench.steps) for end in ("start", "end"))
        if case.method == FPE:
            return paper.FreePrompt(steps, given["token_limit"], numbers(given["layers"]))
        objects = [
            mask[0] if mask is not None else tuple(self.prompt(text).columns(word)) if word else None
            for mask, text, word in (
                (given["source_mask"], case.source, given["source_words"]),
                (given["target_mask"], case.target, given["target_words"]),
            )
        ]
        lists = (numbers(given[name], 0) for name in ("layers", "steps"))
        union = given["reads"] == self_attention.JOINT
        return paper.Mutual(steps, given["layer"], *objects, given["threshold"], quirk, *lists, union)


def numbers(text, start=1):
    """Layers counted from 0, of numbers counted from ``start`` such as "4-9, 12"; None for none."""
    spans = [part.split("-") for part in text.split(",") if part.strip()]
    found = [n - start for span in spans for n in range(int(span[0]), int(span[-1]) + 1)]
    return tuple(found) or None


# ---- what is measured --------------------------------------------------------------------------------------------


def measure_cases(sides):
    """Name -> the largest relative distance of the last latents, the least PSNR between the pictures (100 dB at most),
    and the smallest relative distance between the edit and plain drawing from its target prompt, over the scenes.
    """
    found = {}
    drawn, _, _ = sides.bench.scenes(objects=2)
    for number, scene in enumerate(drawn):
        for name, case in cases(scene).items():
            log.info("%s", name)
            trajectory = sides.trajectory(case, number)
            ours, theirs = sides.ours(case, trajectory), sides.theirs(case, trajectory)[1]
            plain = sides.theirs(replace(case, changed=()), trajectory, plain=True)[1]  # the same for many cases
            row = found.setdefault(name, {"latents apart": [], "pictures dB": [], "edit": []})
            row["latents apart"].append(relative(ours, theirs))
            row["pictures dB"].append(psnr(sides.picture(trajectory, ours), sides.picture(trajectory, theirs)))
            row["edit"].append(relative(theirs, plain))
        log.info("scene %d of %d", number + 1, len(drawn))
    worst = {"latents apart": max, "pictures dB": min, "edit": min}
    return {name: {key: worst[key](row[key]) for key in row} for name, row in found.items()}


# Where the pack departs from the authors' code, and the case that shows it.
QUIRKS = {
    "masks at coarser levels": "MasaCtrl, masks",
    "masks of words at coarser levels": "MasaCtrl, drawn picture, masks of words",
    "a mask between the pixels that are looked at": "MasaCtrl, a thin mask",
    "an object with nothing to read": "MasaCtrl, an empty source mask",
    "a source mask between black and white": "MasaCtrl, a source mask of grays",
}


def measure_differences(sides):
    """As :func:`editing_parity.measure_differences`, for these cases."""
    return editing_parity.measure_differences(sides, cases, QUIRKS)


def measure_source_row(sides, margin=4):
    """Real pictures: how well the source comes back in either source row, under the empty text and under the caption,
    and the background (``margin`` pixels off the true mask) in each method's edit that reads it; mean dB.

    Under the empty text both guidance halves are the same, so a free row drifts by the inversion's error alone; under
    a caption it drifts by guidance as well.
    """
    bench, found = sides.bench, {}
    keys = ("source dB", "background of FPE dB", "background of MasaCtrl dB")
    drawn, pictures, masks = bench.scenes(objects=2)
    for number, (scene, picture, mask) in enumerate(zip(drawn, pictures.split(1), masks, strict=True)):
        off = torch.nn.functional.max_pool2d(mask[:1], 2 * margin + 1, 1, margin)[0] == 0
        listed = cases(scene)
        alone = bench.decode(bench.encode(picture))
        best = decibels((alone - picture).square()[:, off])
        marks = psnr(alone, picture), best, best
        for key, value in zip(keys, marks, strict=True):
            found.setdefault("the autoencoder alone", {}).setdefault(key, []).append(value)
        for text, caption in (("empty text", ""), ("caption", scenes.caption(scene))):
            for row, pinned in (("free", False), ("pinned (Attune)", True)):
                marks = found.setdefault(f"{text}, {row}", {})
                for method in ("FPE", "MasaCtrl"):
                    case = replace(listed[method], source=caption)
                    trajectory = sides.trajectory(case, number)
                    free, edited = sides.theirs(case, trajectory, pinned=pinned)
                    image = sides.picture(trajectory, edited)
                    error = decibels((image - picture).square()[:, off])
                    marks.setdefault(f"background of {method} dB", []).append(error)
                source = trajectory.latents[-1] if pinned else free
                marks.setdefault("source dB", []).append(psnr(sides.picture(trajectory, source), picture))
    return {name: {key: sum(row[key]) / len(row[key]) for key in keys} for name, row in found.items()}


# What is measured, and on how many times as many scenes as asked for.
PARTS = {
    "cases": (measure_cases, 1),
    "differences": (measure_differences, 1),
    "the source row": (measure_source_row, 4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--count", type=int, default=2, help="held-out scenes; four times as many for the source row")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    settings = {"steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    # Parts on the same scenes share what was drawn.
    sides = functools.cache(lambda count: Sides(Bench(count, args.seed, args.steps, args.guidance)))
    for name, (measure, times) in PARTS.items():
        if args.part in (name, "all"):
            count = times * args.count
            with torch.inference_mode():
                found = measure(sides(count))
            log.info("\n%s\n", table(found, name))
            cost.keep("self parity", name, {"scenes": count} | settings | rounded(found))


if __name__ == "__main__":
    main()
