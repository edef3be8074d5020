"""How well edits through self-attention come out beside others, on held-out scenes where the true edit is known.

    --part settings    which settings of each method win, by kind of edit, on other scenes than the rest
    --part edits       a colour, a shape, removals, a background, an addition, by method, with what won
    --part papers      the same with the papers' settings

Plain sampling and Prompt-to-Prompt start from an inversion under the picture's caption, the others from one under an
empty prompt, as their papers have it for real pictures; Free-Prompt-Editing is tried with the caption, too. Masks are
the true ones. Figures are printed, and kept in benchmark/editing.json; the pictures lie in demo/run/self editing, from
which --resume goes on with a run that was stopped.
"""

import argparse
import itertools
import logging
import shutil
from dataclasses import dataclass, replace

import comfy.utils
import numpy as np
import torch
from scipy import ndimage

import nodes as stock

from ..demo import checker, scenes
from ..demo.measure import RUN, call, save
from ..inversion import host
from ..nodes import edit, self_attention
from ..nodes import mask as mask_nodes
from . import cost, editing
from .demo_edits import overlap
from .editing import MARGIN, PLAIN, TRUTH, Studio, Task, decibels_in

COLOUR, SHAPE, BACKGROUND, ADDITION = "colour", "shape", "background", "addition"
REMOVALS = REMOVAL, EMPTYING = "removal", "removal of the only one"
KINDS = COLOUR, SHAPE, *REMOVALS, BACKGROUND, ADDITION
FROM_ONE = EMPTYING, ADDITION  # kinds whose source holds one object
SDEDIT = {"SDEdit 0.5": 0.5, "SDEdit 0.8": 0.8}
P2P, FPE, CAPTIONED = "P2P", "FPE", "FPE, captioned"
MASA, MASKED, CPAM = "MasaCtrl", "MasaCtrl, masked", "CPAM"
log = logging.getLogger("attune.bench")


# ---- what is asked for -------------------------------------------------------------------------------------------


def tasks(drawn, rng):
    """The edits of a scene of two objects, one for each of KINDS."""
    colour, shape, _, background = editing.tasks(drawn, rng)
    (first, second), less = drawn.things, scenes.remove_thing(drawn, 1)
    return [
        colour,
        shape,
        Task(REMOVAL, drawn, scenes.remove_thing(drawn, 0), first.shape),
        Task(EMPTYING, less, scenes.remove_thing(less, 0), first.shape),
        background,
        Task(ADDITION, less, drawn, second.shape),
    ]


def draw_tasks(count, seed):
    """For each of some held-out scenes, its tasks."""
    rng = np.random.default_rng([seed, 13])
    return [tasks(drawn, rng) for drawn in editing.draw_scenes(count, seed, pattern=False, objects=2)]


def objects(scene):
    """The mask of all objects of a scene, (H, W) in 0..1."""
    return scenes.render(scene)[1].max(0)


def only_in(one, other):
    """The mask of those objects of a scene that another does not hold, (H, W) in 0..1."""
    masks = [mask for thing, mask in zip(one.things, scenes.render(one)[1], strict=True) if thing not in other.things]
    return np.max(masks, 0) if masks else np.zeros((scenes.SIZE, scenes.SIZE), np.float32)


def changed(task):
    """The true mask of what an edit changes, (H, W) in 0..1."""
    if task.kind == BACKGROUND:
        return 1 - objects(task.source)
    return np.maximum(only_in(task.source, task.target), only_in(task.target, task.source))


def staying(task):
    """The masks, (H, W) bool, of the objects whose outlines are the same in both scenes."""
    outlines = [_outline(thing) for thing in task.source.things]
    masks = zip(task.target.things, scenes.render(task.target)[1], strict=True)
    return [mask > 0.5 for thing, mask in masks if _outline(thing) in outlines]


def _outline(thing):
    return thing.shape, thing.x, thing.y, thing.r, thing.angle


# ---- what a picture shows ----------------------------------------------------------------------------------------


def succeeded(task, picture):
    """Whether a picture shows the target: the edited thing as asked, the rest in its place, and after a removal or an
    addition no more than that. What is added may stand anywhere; how well it stands in its place is measured apart.
    """
    if task.kind not in (*REMOVALS, ADDITION):
        return editing.succeeded(task, picture)
    found = checker.look(picture)[1]
    if len(found) > len(task.target.things):
        return False
    if task.kind in REMOVALS:
        return editing.succeeded(task, picture)
    added = task.target.things[1]
    as_before = editing.succeeded(Task(ADDITION, task.source, task.source, ""), picture)
    return as_before and any((f.color, f.shape) == (added.color, added.shape) for f in found)


def kept_region(task, margin=0):
    """Where nothing should change, (H, W) bool, at least ``margin`` pixels from what does."""
    change = changed(task) > (0.01 if task.kind == BACKGROUND else 0)
    return ~(ndimage.binary_dilation(change, np.ones((3, 3)), margin) if margin else change)


def mark(task, picture, source, truth):
    """A picture's figures: name -> value, or None for what this kind of edit does not have."""
    found = [f.mask for f in checker.look(picture)[1]]

    def outline(mask):
        return max((float(overlap(f, mask)) for f in found), default=0.0)

    kept = [outline(mask) for mask in staying(task)]
    new = only_in(task.target, task.source) > 0.5
    return {
        "success %": 100.0 * succeeded(task, picture),
        "outside dB": decibels_in(picture, source, kept_region(task)),
        f"outside by {MARGIN} px dB": decibels_in(picture, source, kept_region(task, MARGIN)),
        "kept outlines IoU": float(np.mean(kept)) if kept else None,
        "new outline IoU": outline(new) if task.kind in (SHAPE, ADDITION) else None,
        "inside, to the truth dB": None if picture is truth else decibels_in(picture, truth, changed(task) > 0.5),
    }


def average(marks):
    """The figures' means over those pictures that have them; None where none has."""
    found = {key: [m[key] for m in marks if m[key] is not None] for key in marks[0]}
    return {key: round(float(np.mean(values)), 2) if values else None for key, values in found.items()}


# ---- the methods -------------------------------------------------------------------------------------------------


def every(**values):
    """Every combination of the values, as dictionaries."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


OWN, PAPER = 2.0, 7.5  # the guidance that suits the demo model, and the papers'
WHOLE, NEW = "the whole picture", "what is new"  # what CPAM's prompt tells
# The papers keep the structure in layers of at most 32x32 of 64x64 tokens. The demo's finest layers have 16x16, so that
# there the same layers are those of at most 8x8.
EVERYWHERE, PAPERS_LAYERS = 1024, 64
PAPERS_FPE = {"guidance": PAPER, "end": 0.8, "token_limit": PAPERS_LAYERS}
# What is tried for each method. The first is as in the papers, which do not say what CPAM's prompt should tell.
TRIED = {
    PLAIN: every(guidance=(PAPER, OWN)),
    **{name: every(guidance=(PAPER, OWN)) for name in SDEDIT},
    P2P: [
        {"guidance": PAPER, "cross_end": 0.8, "self_end": 0.4, "token_limit": PAPERS_LAYERS},
        *every(guidance=[OWN], cross_end=(0.4, 0.8), self_end=(0.4, 0.8)),
    ],
    FPE: [PAPERS_FPE, *every(guidance=(PAPER, OWN), end=(0.8, 0.4))],
    CAPTIONED: [PAPERS_FPE, {"guidance": PAPER, "end": 0.8}, *every(guidance=[OWN], end=(0.8, 0.4))],
    MASA: [
        {"guidance": PAPER, "layer": 10, "start": 0.08},
        *every(guidance=[OWN], layer=(10, 6), start=[0.08]),
        {"guidance": OWN, "layer": 10, "start": 0.3},
    ],
    MASKED: every(guidance=(PAPER, OWN), layer=[10], start=[0.08]),
    CPAM: every(guidance=(PAPER, OWN), prompt=(WHOLE, NEW)),
}
METHODS = tuple(TRIED)
GOALS = {
    COLOUR: "edit inside",
    SHAPE: "replace object",
    REMOVAL: "remove",
    EMPTYING: "remove",
    BACKGROUND: "change background",
    ADDITION: "add",
}


def as_mask(mask):
    return torch.from_numpy(np.ascontiguousarray(mask, np.float32))[None]


def sample_plainly(bench, task, trajectory, guidance):
    return bench.model, bench.text(task.prompts[1])


def exchange_words(bench, task, trajectory, guidance, cross_end, self_end, token_limit=EVERYWHERE):
    node = edit.AttunePromptRefine if task.kind in (*REMOVALS, ADDITION) else edit.AttunePromptSwap
    return call(node, bench.model, bench.clip, trajectory, *task.prompts, 0.0, cross_end, 0.0, self_end, token_limit)


def read_maps(bench, task, trajectory, guidance, end, token_limit=EVERYWHERE, layers="", source=""):
    settings = source, task.prompts[1], 0.0, end, token_limit, layers
    return call(self_attention.AttuneFreePromptEditing, bench.model, bench.clip, trajectory, *settings)


def read_captioned_maps(bench, task, trajectory, guidance, end, **layers):
    return read_maps(bench, task, trajectory, guidance, end, **layers, source=task.prompts[0])


def read_values(bench, task, trajectory, guidance, layer, start, **masks):
    settings = {"source_prompt": "", "target_prompt": task.prompts[1], "start": start, "end": 1.0, "layer": layer}
    return call(self_attention.AttuneMutualSelfAttention, bench.model, bench.clip, trajectory, **settings, **masks)


def read_values_by_mask(bench, task, trajectory, guidance, **settings):
    """The object is what changes, and a removed one leaves nothing behind that may read it. What is added has no
    source, so there the object is the one that stays, as all objects are on a new background.
    """
    if task.kind in (BACKGROUND, ADDITION):
        source = target = objects(task.source)
    else:
        source, target = only_in(task.source, task.target), only_in(task.target, task.source)
    masks = {"source_mask": as_mask(source), "target_mask": as_mask(target)}
    return read_values(bench, task, trajectory, guidance, **settings, **masks)


def preserve_context(bench, task, trajectory, guidance, prompt, plain_share=0.1, **modules):
    """A thing of another shape may take the room of both; the mask of a background is that of what stands on it."""
    mask, told = objects(task.source) if task.kind == BACKGROUND else changed(task), task.target
    if prompt == NEW:  # on a new background, that is the background
        told = replace(told, things=tuple(thing for thing in told.things if thing not in task.source.things))
    source_mask, target_mask, keep_object = call(mask_nodes.AttuneMaskStrategy, as_mask(mask), GOALS[task.kind], 8)
    every_step, by_source = self_attention.EVERY, self_attention.BY_SOURCE
    where = source_mask, keep_object, plain_share, 0, every_step, 0.08, 9, by_source, target_mask
    node = self_attention.AttuneContextPreserving
    return call(node, bench.model, bench.clip, trajectory, scenes.caption(told), *where, **modules)


MAKERS = {
    PLAIN: sample_plainly,
    P2P: exchange_words,
    FPE: read_maps,
    CAPTIONED: read_captioned_maps,
    MASA: read_values,
    MASKED: read_values_by_mask,
    CPAM: preserve_context,
}


def image_to_image(bench, task, trajectory, strength, guidance):
    """The stock sampler from the source's latent under this share of the noise."""
    latent = {"samples": host.to_host_scale(bench.model, trajectory.latents[-1])}
    settings = bench.seed, bench.steps, guidance, "euler", "normal"
    texts = bench.text(task.prompts[1]), bench.text("")
    return bench.decode(call(stock.KSampler, bench.model, *settings, *texts, latent, strength)[0])


def say(settings):
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def empty(scene):
    return ""


@dataclass(frozen=True)
class Room:
    """Tasks, and what their pictures are made from: trajectories by kind and by the prompt they were made under."""

    studio: Studio
    name: str
    asked: list
    runs: dict

    @classmethod
    def open(cls, studio, name, count, seed):
        asked, runs = draw_tasks(count, seed), {}
        for text in (scenes.caption, empty):
            for kind in (COLOUR, ADDITION):
                drawn = [row[KINDS.index(kind)].source for row in asked]
                found = studio.invert(drawn, f"{name} {count} {kind} {text.__name__}", text=text)
                runs |= {(other, text): found for other in KINDS if (other in FROM_ONE) == (kind in FROM_ONE)}
        return cls(studio, name, asked, runs)

    def source(self, i, kind):
        name = f"{self.name} {i} source{' of the addition' if kind in FROM_ONE else ''}"
        return self.studio.source(name, self.runs[kind, scenes.caption][i])

    def truth(self, i, task):
        return self.studio.truth(f"{self.name} {i} {task.kind} truth", task.target)

    def edited(self, i, task, method, settings):
        """The picture of a task of scene ``i`` by a method, (H, W, 3) in 0..1."""
        studio, name = self.studio, f"{self.name} {i} {task.kind}, {method}, {say(settings)}"
        trajectory = self.runs[task.kind, scenes.caption if method in (PLAIN, P2P, CAPTIONED) else empty][i]
        if method in SDEDIT:
            return studio.keep(name, lambda: image_to_image(studio.bench, task, trajectory, SDEDIT[method], **settings))

        def make():
            return MAKERS[method](studio.bench, task, trajectory, **settings)

        return studio.draw(name, trajectory, settings["guidance"], make)

    def mark(self, i, task, picture):
        return mark(task, picture, self.source(i, task.kind), self.truth(i, task))


# ---- the tables --------------------------------------------------------------------------------------------------


def best(rows):
    """The name of the row with the most successes, and among equals of the one that leaves most alone."""
    return max(rows, key=lambda name: (rows[name]["success %"], rows[name]["outside dB"]))


def find_settings(room, methods):
    """For each kind and method, the figures of every setting that is tried, and the one that wins."""
    out = {kind: {} for kind in KINDS if kind != EMPTYING}
    for method, (number, kind) in itertools.product(methods, enumerate(KINDS)):
        if kind == EMPTYING:  # takes what wins for the other removal
            continue
        tried = {say(settings): settings for settings in TRIED[method]}
        figures = {}
        for said, settings in tried.items():
            row = [(i, asked[number]) for i, asked in enumerate(room.asked)]
            figures[said] = average([room.mark(i, t, room.edited(i, t, method, settings)) for i, t in row])
            log.info("%s, %s, %s: %s", method, kind, said, figures[said])
        out[kind][method] = {"won": tried[best(figures)], "tried": figures}
    return out


def mark_all(room, settings, sheet, shown=4):
    """(kind, method) -> the marks of its pictures. ``settings`` gives a kind's and method's; None leaves it out."""
    found, sheets = {}, {kind: [] for kind in KINDS}
    for i, asked in enumerate(room.asked):
        for task in asked:
            source, truth = strip = [room.source(i, task.kind), room.truth(i, task)]
            found.setdefault((task.kind, TRUTH), []).append(mark(task, truth, source, truth))
            for method in METHODS:
                chosen = settings(task.kind, method)
                if chosen is not None:
                    strip.append(room.edited(i, task, method, chosen))
                    found.setdefault((task.kind, method), []).append(mark(task, strip[-1], source, truth))
            sheets[task.kind] += strip if i < shown else []
        log.info("scene %d of %d", i + 1, len(room.asked))
    for kind, pictures in sheets.items():
        save(f"{sheet}_{kind}.png", [torch.from_numpy(p) for p in pictures], len(strip))
    return found


def averages(marks):
    out = {kind: {} for kind in KINDS}
    for (kind, method), rows in marks.items():
        out[kind][method] = average(rows)
    return out


# ---- what the papers say -----------------------------------------------------------------------------------------


def compare(marks, kinds, one, other, key):
    """Two methods' means of a figure over kinds of edits, and in what share of pictures the first has more."""
    pairs = [
        (a[key], b[key])
        for kind in kinds
        for a, b in zip(marks[kind, one], marks[kind, other], strict=True)
        if a[key] is not None and b[key] is not None
    ]
    first, second = np.array(pairs, float).T
    return {
        f"{one}, {key}": round(float(first.mean()), 2),
        f"{other}, {key}": round(float(second.mean()), 2),
        f"pictures where {one} has more %": round(100 * float((first > second).mean()), 1),
        f"pictures where {other} has more %": round(100 * float((first < second).mean()), 1),
    }


LOCAL = COLOUR, SHAPE, *REMOVALS, ADDITION  # kinds of edits that should leave the background alone


def claims(marks):
    """What the papers claim that this world can speak to -> the numbers, and whether they bear it out."""

    def judge(numbers, holds):
        return numbers | {"verdict": "confirmed" if holds else "contradicted"}

    def mean(kind, method, key="success %"):
        return average(marks[kind, method])[key]

    out = {}
    for one in (FPE, CAPTIONED):
        pairs = zip(marks[COLOUR, one], marks[COLOUR, P2P], strict=True)
        won = [(a["success %"] > 0, b["success %"] > 0) for a, b in pairs]
        out[f"{one} changes colours that P2P fails to change"] = judge(
            {
                "scenes where P2P fails": sum(not b for _, b in won),
                f"of these {one} succeeds in": sum(a and not b for a, b in won),
                f"scenes where {one} fails": sum(not a for a, _ in won),
                "of these P2P succeeds in": sum(b and not a for a, b in won),
            },
            mean(COLOUR, one) > mean(COLOUR, P2P),
        )
    for rival in (MASA, MASKED):
        numbers = compare(marks, LOCAL, CPAM, rival, "outside dB")
        first, second = list(numbers.values())[:2]
        out[f"CPAM keeps backgrounds that {rival} alters"] = judge(numbers, first > second)
    for kind in REMOVALS:
        numbers = {m: {k: mean(kind, m, k) for k in ("success %", "inside, to the truth dB")} for m in METHODS}
        rest = max(numbers[m]["success %"] for m in METHODS if m not in (CPAM, MASKED))
        out[f"reading only the background removes an object: {kind}"] = judge(
            numbers, numbers[CPAM]["success %"] > rest
        )
    low, high = SDEDIT
    numbers = {m: {k: mean(COLOUR, m, k) for k in ("success %", "outside dB")} for m in (low, high)}
    out["SDEdit follows the prompt better with more noise, and keeps less"] = judge(
        numbers,
        numbers[low]["success %"] < numbers[high]["success %"]
        and numbers[low]["outside dB"] > numbers[high]["outside dB"],
    )
    for one in (MASA, MASKED):
        numbers = {m: mean(SHAPE, m) for m in (one, P2P, FPE, CAPTIONED)}
        rest = max(numbers[m] for m in (P2P, FPE, CAPTIONED))
        out[f"{one} changes shapes where the source's maps forbid it"] = judge(numbers, numbers[one] > rest)
    return out


# ---- running -----------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("settings", "edits", "papers", "all"), default="all")
    parser.add_argument("--count", type=int, default=16, help="held-out scenes; a quarter of them for the settings")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these; nothing is kept then")
    parser.add_argument("--resume", action="store_true", help="go on with the pictures that a stopped run left")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder = RUN / "self editing" / f"{args.steps} steps, seed {args.seed}"
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    methods = args.methods or METHODS

    def keep(part, count, found):
        if not args.methods:
            cost.keep("self quality", part, {"scenes": count, "steps": args.steps, "seed": args.seed, **found})

    with torch.inference_mode():
        studio = Studio(args.steps, args.seed, folder)
        if args.part in ("settings", "all"):
            few = max(1, args.count // 4)
            room = Room.open(studio, "settings", few, args.seed + 1000)
            found = find_settings(room, methods)
            keep("settings", few, found)
        for part in ("edits", "papers"):
            if args.part not in (part, "all"):
                continue
            won = cost.kept().get("self quality", {}).get("settings")
            if part == "edits" and won is None:
                raise SystemExit("No settings are known yet; run --part settings first.")

            def settings(kind, method, part=part, won=won):
                if method not in methods:
                    return None
                kind = REMOVAL if kind == EMPTYING else kind
                return won[kind][method]["won"] if part == "edits" else TRIED[method][0]

            marks = mark_all(Room.open(studio, "edits", args.count, args.seed), settings, f"self_{part}")
            found = {"kinds": averages(marks)}
            log.info("\n%s", editing.table(found["kinds"], "edit"))
            if args.methods:
                continue
            found["settings"] = {kind: {m: say(settings(kind, m)) for m in METHODS} for kind in KINDS}
            rows = {kind: {m: row for m, row in found["kinds"][kind].items() if m != TRUTH} for kind in KINDS}
            found |= {"wins": {kind: best(row) for kind, row in rows.items()}, "claims": claims(marks)}
            for claim, numbers in found["claims"].items():
                log.info("%s: %s", claim, numbers)
            keep(part, args.count, found)


if __name__ == "__main__":
    main()
