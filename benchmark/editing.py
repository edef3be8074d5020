"""How well edits come out, on held-out scenes of the demo world, where the true edited picture is known.

    --part edits       a colour, a shape, a pattern, a background, by method and inversion
    --part reweight    a word's weight raised and lowered
    --part settings    which windows and which guidance win, on other scenes than the rest is measured on

An edit counts as a success if a program that knows the world's rules sees the new thing in its place, and everything
else still there. What an edit leaves alone is measured off the true masks of what it changes, against the source as the
autoencoder gives it back. Figures are printed, and kept in benchmark/editing.json; the pictures lie in
demo/run/editing, from which --resume goes on with a run that was stopped.
"""

import argparse
import itertools
import logging
import shutil
from dataclasses import dataclass

import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ..demo import checker, scenes
from ..demo.measure import RUN, Bench, call, save
from ..inversion import host
from ..inversion.report import decibels
from ..inversion.trajectory import Trajectory, negative_of
from ..nodes import edit, invert
from . import cost
from .demo_edits import OVERLAP, look_inside, overlap, pattern_of

MARGIN = 4  # pixels: how far the autoencoder's blur at an outline reaches
DDIM, NULL_TEXT = "DDIM", "null-text"
TRUTH, PLAIN, EDIT, BLEND, EMBEDDING = "truth", "plain", "edit", "edit + blend", "EmbCtrl"
METHODS = PLAIN, EDIT, BLEND, EMBEDDING
log = logging.getLogger("attune.bench")


# ---- what is asked for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One edit of one scene: what it is called, the two scenes, and the words that bound it."""

    kind: str
    source: scenes.Scene
    target: scenes.Scene
    inside: str
    outside: str = ""

    @property
    def prompts(self):
        return scenes.caption(self.source), scenes.caption(self.target)


def tasks(source, rng):
    """The four edits of a scene whose first object is plain."""
    first = source.things[0]
    used = {t.color for t in source.things} | {source.background}
    shapes = [t.shape for t in source.things]

    def pick(names, without):
        return str(rng.choice([n for n in names if n not in without]))

    color, shape = pick(scenes.COLORS, used), pick(scenes.SHAPES, shapes)
    pattern, background = pick(scenes.PATTERNS, ("plain",)), pick(scenes.BACKGROUNDS, used)
    return [
        Task("colour", source, scenes.edit_thing(source, 0, color=color), first.shape),
        Task("shape", source, scenes.edit_thing(source, 0, shape=shape), f"{first.shape}, {shape}"),
        Task("pattern", source, scenes.edit_thing(source, 0, pattern=pattern), first.shape),
        # "background" is a word that looks everywhere and nowhere; the things are what has to be kept.
        Task("background", source, scenes.edit_background(source, background), "", ", ".join(shapes)),
    ]


KINDS = "colour", "shape", "pattern", "background"


def draw_scenes(count, seed, pattern, objects=None):
    """Held-out scenes whose shapes differ and whose first object is plain, or patterned; of 1 or 2 objects."""
    rng, drawn = np.random.default_rng([seed, 11]), []
    while len(drawn) < count:
        one = scenes.draw_scene(rng, held_out=True, objects=objects)
        shapes = {t.shape for t in one.things}
        if len(shapes) == len(one.things) and (one.things[0].pattern != "plain") == pattern:
            drawn.append(one)
    return drawn


# ---- what a picture shows ----------------------------------------------------------------------------------------


def chroma(picture, mask):
    """How colourful a patch is: the mean difference between each pixel's greatest and least channel, 0..1."""
    pixels = picture[mask > 0.99]
    return float((pixels.max(1) - pixels.min(1)).mean())


def succeeded(task, picture):
    """Whether a picture shows the target: the edited thing as asked, the other things and the background as before."""
    background, found = checker.look(picture)
    masks = scenes.render(task.target)[1]

    def at(mask):
        return max(found, key=lambda f: overlap(f.mask, mask > 0.5), default=None)

    if background != task.target.background:
        return False
    for number, (thing, mask) in enumerate(zip(task.target.things, masks, strict=True)):
        seen = at(mask)
        if seen is None or overlap(seen.mask, mask > 0.5) < OVERLAP or seen.color != thing.color:
            return False
        if task.kind == "shape" and number == 0 and seen.shape != thing.shape:
            return False
        if task.kind == "pattern" and number == 0 and pattern_of(picture, mask) != thing.pattern:
            return False
    return True


def kept_region(task, margin=0):
    """Where nothing should change, (H, W) bool: off both objects, or in a new background on the objects."""
    before, after = (scenes.render(s)[1] for s in (task.source, task.target))
    if task.kind == "background":
        on = before.max(0) > 0.99
        return ndimage.binary_erosion(on, iterations=margin) if margin else on
    changed = np.maximum(before[0], after[0]) > 0
    return ~(ndimage.binary_dilation(changed, np.ones((3, 3)), margin) if margin else changed)


def decibels_in(picture, other, region):
    return decibels(torch.from_numpy(np.square(picture - other)[region])[None]) if region.any() else None


# ---- making pictures ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """An edit's windows and the guidance that it is drawn with."""

    cross_end: float
    self_end: float
    guidance: float

    def __str__(self):
        return f"cross {self.cross_end:g}, self {self.self_end:g}, guidance {self.guidance:g}"

    @property
    def windows(self):
        return 0.0, self.cross_end, 0.0, self.self_end, 1024


class Studio:
    """Makes pictures, and keeps each in a file, so that a run that was stopped need not make them again."""

    def __init__(self, steps, seed, folder):
        self.bench = Bench(0, seed, steps, 1.0)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def invert(self, drawn, name, guidance=None, batch=8, text=scenes.caption):
        """Trajectories of scenes, one for each: DDIM inversions, or null-text inversions where guidance is given.

        ``text`` gives the prompt that a scene is inverted under.
        """
        file = self.folder / f"{name} {guidance or 1:g}.pt"
        if not file.exists():
            parts = [self._invert(drawn[i : i + batch], guidance, text) for i in range(0, len(drawn), batch)]
            torch.save([one for part in parts for one in part], file)
            log.info("%s", file.stem)
        return [self._trajectory(*one) for one in torch.load(file)]

    def _invert(self, drawn, guidance, text):
        bench = self.bench
        pictures = torch.from_numpy(np.stack([scenes.render(s)[0] for s in drawn]))
        trajectory = bench.invert(bench.encode(pictures), bench.text(*map(text, drawn)))[0]
        if guidance is not None:
            settings = bench.text(""), guidance, 10, 0.01, 1e-5, True
            trajectory = call(invert.AttuneNullTextInversion, trajectory, bench.model, *settings)[0]
        rows = range(len(drawn))
        nulls = [None if trajectory.nulls is None else trajectory.nulls[:, i : i + 1].clone() for i in rows]
        return [(trajectory.sigmas, trajectory.latents[:, i : i + 1].clone(), nulls[i]) for i in rows]

    def _trajectory(self, sigmas, latents, nulls):
        header = host.describe_model(self.bench.model)
        windows = () if nulls is None else host.windows(self.bench.model, sigmas)
        return Trajectory(sigmas, latents, len(sigmas) - 1, header, [], self.bench.text(""), nulls, windows)

    def draw(self, name, trajectory, guidance, make, *args):
        """The picture of this name, (H, W, 3) in 0..1. ``make(*args)`` gives the MODEL and the positive."""

        def sample():
            euler = call(custom.KSamplerSelect, "euler")[0]
            noise = {"samples": host.to_host_scale(self.bench.model, trajectory.noise)}
            model, positive = make(*args)
            rest = negative_of(trajectory), euler, trajectory.sigmas, noise
            return self.bench.decode(call(custom.SamplerCustom, model, False, 0, guidance, positive, *rest)[0])

        return self.keep(name, sample)

    def keep(self, name, make):
        file = self.folder / f"{name}.png"
        if not file.exists():
            pixels = make()[0].clamp(0, 1).mul(255).round().byte().numpy()
            Image.fromarray(pixels).save(file.with_suffix(".part"), "png")
            file.with_suffix(".part").rename(file)
        return np.asarray(Image.open(file), np.float32) / 255

    def source(self, name, trajectory):
        """The source as the autoencoder gives it back: what an edit that changes nothing would show."""
        return self.keep(name, lambda: host.decode(self.bench.vae, trajectory, trajectory.latents[-1]))

    def truth(self, name, scene):
        picture = torch.from_numpy(scenes.render(scene)[0])[None]
        return self.keep(name, lambda: self.bench.decode(self.bench.encode(picture)))

    def edited(self, name, trajectory, task, method, settings):
        """The picture of an edit by a method."""
        return self.draw(name, trajectory, settings.guidance, self.edit, trajectory, task, method, settings)

    def edit(self, trajectory, task, method, settings):
        bench, (before, after) = self.bench, task.prompts
        if method == PLAIN:
            return bench.model, bench.text(after)
        if method == EMBEDDING:
            return bench.model, call(edit.AttuneEmbeddingControl, bench.clip, trajectory, before, after)[0]
        node = edit.AttunePromptRefine if task.kind == "pattern" else edit.AttunePromptSwap
        made = call(node, bench.model, bench.clip, trajectory, before, after, *settings.windows)
        return self.blend(made[0], trajectory, task) if method == BLEND else made

    def weigh(self, trajectory, task, method, settings, word, factor):
        bench, caption = self.bench, task.prompts[0]
        if method == PLAIN:
            return bench.model, bench.text(caption.replace(word, f"({word}:{factor:g})", 1))
        weights = caption, f"{word}: {factor:g}"
        made = call(edit.AttunePromptReweight, bench.model, bench.clip, trajectory, *weights, *settings.windows)
        return self.blend(made[0], trajectory, task) if method == BLEND else made

    def blend(self, model, trajectory, task):
        words = *task.prompts, task.inside, task.outside
        return call(edit.AttuneLocalBlend, model, self.bench.clip, trajectory, *words, 0.3, 0.2, 256)


# ---- edits -------------------------------------------------------------------------------------------------------


def mark(task, picture, source):
    """Success, and the dB of what was to stay, on the whole of it and away from outlines."""
    regions = kept_region(task), kept_region(task, MARGIN)
    return succeeded(task, picture), *(decibels_in(picture, source, region) for region in regions)


def average(marks):
    success, outside, off = zip(*marks, strict=True)
    off = [value for value in off if value is not None]
    return {
        "success %": round(100 * float(np.mean(success)), 1),
        "outside dB": round(float(np.mean(outside)), 2),
        f"outside by {MARGIN} px dB": round(float(np.mean(off)), 2),
    }


def all_tasks(drawn, seed):
    rng = np.random.default_rng([seed, 13])
    return [tasks(source, rng) for source in drawn]


CROSS_ENDS, SELF_ENDS, GUIDANCES = (0.4, 0.8), (0.4, 0.8), (2.0, 7.5)


def find_settings(studio, count, seed):
    """For each kind and inversion, the figures of each setting without local blend, and the winner: of those with the
    most successes the one that leaves most alone."""
    drawn = draw_scenes(count, seed, pattern=False)
    asked, ddim = all_tasks(drawn, seed), studio.invert(drawn, "settings")
    learned = {g: studio.invert(drawn, "settings", g) for g in GUIDANCES[1:]}
    out = {}
    for number, kind in enumerate(KINDS):
        for way in (DDIM, NULL_TEXT):
            figures = {}
            for values in itertools.product(CROSS_ENDS, SELF_ENDS, GUIDANCES if way == DDIM else GUIDANCES[1:]):
                settings, marks = Settings(*values), []
                for i, trajectory in enumerate(ddim if way == DDIM else learned[settings.guidance]):
                    task = asked[i][number]
                    name = f"settings {i} {kind}, {way}, {settings}"
                    picture = studio.edited(name, trajectory, task, EDIT, settings)
                    marks.append(mark(task, picture, studio.source(f"settings {i} source", ddim[i])))
                figures[settings] = average(marks)
                log.info("%s, %s, %s: %s", kind, way, settings, figures[settings])
            best = max(figures, key=lambda s: (figures[s]["success %"], figures[s]["outside dB"]))
            tried = {str(settings): row for settings, row in figures.items()}
            out.setdefault(kind, {})[way] = {"won": vars(best), "tried": tried}
    return out


def edits(studio, count, seed, won, shown=4):
    """For each kind, method and inversion, the mean of :func:`mark` over scenes."""
    drawn = draw_scenes(count, seed, pattern=False)
    asked, ddim = all_tasks(drawn, seed), studio.invert(drawn, "edits")
    learned, rows = {}, {kind: {} for kind in KINDS}
    sheets = {kind: [] for kind in KINDS}
    for i in range(count):
        source = studio.source(f"edits {i} source", ddim[i])
        for task in asked[i]:
            truth = studio.truth(f"edits {i} {task.kind} truth", task.target)
            rows[task.kind].setdefault((TRUTH, ""), []).append(mark(task, truth, source))
            strip = [source, truth]
            for way in (DDIM, NULL_TEXT):
                settings = Settings(**won[task.kind][way]["won"])
                if way == NULL_TEXT and settings.guidance not in learned:
                    learned[settings.guidance] = studio.invert(drawn, "edits", settings.guidance)
                trajectory = ddim[i] if way == DDIM else learned[settings.guidance][i]
                for method in METHODS:
                    name = f"edits {i} {task.kind}, {method}, {way}, {settings}"
                    picture = studio.edited(name, trajectory, task, method, settings)
                    rows[task.kind].setdefault((method, way), []).append(mark(task, picture, source))
                    strip.append(picture)
            sheets[task.kind] += strip if i < shown else []
        log.info("scene %d of %d", i + 1, count)
    for kind, pictures in sheets.items():
        save(f"editing_{kind}.png", [torch.from_numpy(p) for p in pictures], 2 + 2 * len(METHODS))
    out = {
        kind: {", ".join(filter(None, key)): average(marks) for key, marks in found.items()}
        for kind, found in rows.items()
    }
    return {
        "kinds": out,
        "settings": {f"{k}, {way}": str(Settings(**won[k][way]["won"])) for k in KINDS for way in (DDIM, NULL_TEXT)},
        "local blend adds to the outside dB": {
            f"{k}, {way}": round(out[k][f"{BLEND}, {way}"]["outside dB"] - out[k][f"{EDIT}, {way}"]["outside dB"], 2)
            for k in KINDS
            for way in (DDIM, NULL_TEXT)
        },
        "direct is DDIM, to the bit": direct_is_ddim(studio, asked[0][0], ddim[0], won),
    }


def direct_is_ddim(studio, task, trajectory, won):
    """Whether an edit that reads a direct inversion is the same one. Its source is pinned to the same latents."""
    settings = Settings(**won[task.kind][DDIM]["won"])
    pinned = call(invert.AttuneDirectInversion, trajectory, 1, 1.0, settings.guidance)[0]
    one, other = (studio.edited(f"direct {n}", t, task, EDIT, settings) for n, t in enumerate((trajectory, pinned)))
    return bool(np.array_equal(one, other))


# ---- weights -----------------------------------------------------------------------------------------------------

FACTORS = {"raised": 4.0, "lowered": -2.0}
SEEN = 0.02  # the least relative change that counts
MEASURES = {"pattern": ("contrast", lambda p, m: look_inside(p, m)[0]), "colour": ("chroma", chroma)}


def weighable(source, kind):
    """The word of the first object that is weighed, or None where it cannot be seen to grow or fade."""
    first = source.things[0]
    if kind == "pattern":
        return first.pattern if first.pattern != "plain" else None
    return first.color if first.color not in ("white", "black", "gray") else None


def weigh_scene(studio, source, kind, name, trajectories, settings):
    """For a scene: (method, inversion, turn) -> change, whether it goes the right way, dB outside; and the pictures.

    Changes are shares of what the same method draws at a factor of 1. Plain sampling weighs the word in the prompt.
    """
    task, word = Task("weight", source, source, source.things[0].shape), weighable(source, kind)
    measure, mask = MEASURES[kind][1], scenes.render(source)[1][0]
    regions = kept_region(task), kept_region(task, MARGIN)
    before = studio.source(f"{name} source", trajectories[DDIM])
    found, strip = {}, [before]
    for (way, trajectory), method in itertools.product(trajectories.items(), (PLAIN, EDIT, BLEND)):
        making = studio.weigh, trajectory, task, method, settings, word
        pictures = {
            factor: studio.draw(f"{name}, {method}, {way}, {factor:g}", trajectory, settings.guidance, *making, factor)
            for factor in (1.0, *FACTORS.values())
        }
        strip += pictures.values()
        values = {factor: measure(picture, mask) for factor, picture in pictures.items()}
        for turn, factor in FACTORS.items():
            change = values[factor] / max(values[1.0], 1e-6) - 1
            right = change * (1 if factor > 1 else -1) > SEEN
            outside = [decibels_in(pictures[factor], before, region) for region in regions]
            found[method, way, turn] = change, right, *outside
    return found, strip


def reweight(studio, count, seed, settings, shown=2):
    """For each kind of word, method and inversion: the change of what the word says, and how often it goes right."""
    out, pictures = {}, []
    for kind, (unit, _) in MEASURES.items():
        drawn = [s for s in draw_scenes(8 * count, seed, pattern=kind == "pattern") if weighable(s, kind)][:count]
        ddim = studio.invert(drawn, f"weight {kind}")
        learned = studio.invert(drawn, f"weight {kind}", settings.guidance)
        found = {}
        for i, source in enumerate(drawn):
            trajectories = {DDIM: ddim[i], NULL_TEXT: learned[i]}
            rows, strip = weigh_scene(studio, source, kind, f"weight {i} {kind}", trajectories, settings)
            for key, row in rows.items():
                found.setdefault(key, []).append(row)
            pictures += strip if i < shown else []
            log.info("%s, scene %d of %d", kind, i + 1, len(drawn))
        out[f"{kind} ({unit})"] = {", ".join(key): average_change(rows) for key, rows in found.items()}
    save("editing_weight.png", [torch.from_numpy(p) for p in pictures], 1 + 2 * 3 * (1 + len(FACTORS)))
    return out


def average_change(rows):
    change, right, outside, off = zip(*rows, strict=True)
    return {
        "median change %": round(100 * float(np.median(change)), 1),
        "right way %": round(100 * float(np.mean(right)), 1),
        "outside dB": round(float(np.mean(outside)), 2),
        f"outside by {MARGIN} px dB": round(float(np.mean([v for v in off if v is not None])), 2),
    }


# ---- running -----------------------------------------------------------------------------------------------------


def table(found, first):
    """Rows of rows as one Markdown table; None is an empty place."""
    keys = list(dict.fromkeys(k for rows in found.values() for row in rows.values() for k in row))
    lines = [f"| {first} | method | " + " | ".join(keys) + " |", "|---" * (len(keys) + 2) + "|"]
    for kind, rows in found.items():
        for name, row in rows.items():
            figures = ("" if row[key] is None else str(row[key]) for key in keys)
            lines.append(f"| {kind} | {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


WEIGHING = Settings(0.8, 0.4, 2.0)  # the nodes' windows, at the guidance that suits the demo model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("settings", "edits", "reweight", "all"), default="all")
    parser.add_argument("--count", type=int, default=16, help="held-out scenes; a third of them for the settings")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the pictures that a stopped run left")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder = RUN / "editing" / f"{args.steps} steps, seed {args.seed}"
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)

    def keep(part, count, found):
        cost.keep("quality", part, {"scenes": count, "steps": args.steps, "seed": args.seed, **found})

    with torch.inference_mode():
        studio = Studio(args.steps, args.seed, folder)
        if args.part in ("settings", "all"):
            few = max(1, args.count // 3)
            keep("settings", few, find_settings(studio, few, args.seed + 1000))
        if args.part in ("edits", "all"):
            won = cost.kept().get("quality", {}).get("settings")
            if won is None:
                raise SystemExit("No settings are known yet; run --part settings first.")
            found = edits(studio, args.count, args.seed, won)
            log.info("\n%s", table(found["kinds"], "edit"))
            for kind, settings in found["settings"].items():
                log.info("%s: %s", kind, settings)
            keep("edits", args.count, found)
        if args.part in ("reweight", "all"):
            found = reweight(studio, args.count, args.seed, WEIGHING)
            log.info("\n%s", table(found, "word"))
            keep("reweight", args.count, found | {"settings": vars(WEIGHING) | FACTORS})


if __name__ == "__main__":
    main()
