"""MaSaFusion on the demo model. Run through ``python3 dev.py bench fusion PART``.

    adapter     how well the demo's sketch adapter holds an outline, beside no adapter
    settings    windows and guidance, on scenes that no other part uses
    edits       a new shape in place, a move, an addition, from a sketch: beside other methods, and by both readings of
                what equation 9 has attend outside the mask
    noise       figures 4 and 14: where the intermediate picture starts, and the adapter alone
    region      figure 7: a mask that is too small or too large
    steps       figure 12: in how many steps the source is read without an intermediate, in the mask and without one
    turns       five turns in a row, beside five that decode and encode
    cost        UNet rows a step and seconds, null-text against direct inversion

Scenes are held out, their sketches are the true edited scene's outlines, and masks are the true ones, grown a little.
Figures are printed, and kept in benchmark/fusion.json; pictures lie in demo/run/fusion, from which --resume goes on.
"""

import argparse
import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import numpy as np
import torch
from scipy.ndimage import binary_dilation

import nodes as stock

from ..attention_patches import masked_fusion as fusion_rules
from ..attention_patches.sketch import sketch_of
from ..demo import checker, scenes
from ..demo.measure import RUN, call, save
from ..demo.model import ADAPTER
from ..inversion import host
from ..nodes import edit, fusion, invert, self_attention
from .demo_edits import OVERLAP, move, overlap
from .editing import Studio, decibels_in
from .inversion import Clock

RESULTS = Path(__file__).parent / "fusion.json"
SHAPE, MOVE, ADDITION = KINDS = "shape", "move", "addition"
SETTINGS, TEST, TURNS = 1, 2, 3  # which scenes a part draws
GROW = 6  # pixels that a mask reaches around what changes
CELL = 8  # pixels of a latent pixel's side
SEAM = 4  # pixels on either side of a seam that show it
RESAMPLED = 10_000
NULL_TEXT, DIRECT, ALONE = "MaSaFusion, null-text", "MaSaFusion, direct", "without intermediate"
DIRECT_OWN, ALONE_OWN = f"{DIRECT}, own queries", f"{ALONE}, own queries"
ADAPTED, MASA, MASA_SKETCH, P2P = "adapter alone", "MasaCtrl", "MasaCtrl, sketch", "P2P"
INPAINT, INPAINT_SKETCH, TRUTH = "inpainting", "inpainting, sketch", "the truth"
METHODS = (
    NULL_TEXT, DIRECT, DIRECT_OWN, ALONE, ALONE_OWN, ADAPTED, MASA, MASA_SKETCH, P2P, INPAINT, INPAINT_SKETCH,
)  # fmt: skip
PAPERS = {"start": 0.08, "layer": 10}
log = logging.getLogger("attune.bench")


# ---- what is asked for -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """An edit of a scene, with what the user would draw for it."""

    kind: str
    source: scenes.Scene
    target: scenes.Scene
    grow: int = GROW

    @property
    def prompts(self):
        return scenes.caption(self.source), scenes.caption(self.target)

    @property
    def mask(self):
        """(1, H, W) in 0..1; shrunk where ``grow`` is below 0."""
        true = torch.from_numpy(scenes.changed(self.source, self.target))[None]
        reach = abs(self.grow)
        pool = torch.nn.functional.max_pool2d
        grown = pool(true if self.grow >= 0 else -true, 2 * reach + 1, 1, reach)
        return (grown if self.grow >= 0 else -grown).clamp(0, 1)

    @property
    def sketch(self):
        return sketch_of(torch.from_numpy(scenes.render(self.target)[1]))


def draw_tasks(count, seed, which):
    """The three edits of each of some held-out scenes of two objects of different shapes."""
    rng, out = np.random.default_rng([seed, 17, which]), []
    while len(out) < count:
        one = scenes.draw_scene(rng, held_out=True, objects=2)
        first, second = one.things
        moved = move(one, rng)
        if moved is None or first.shape == second.shape:
            continue
        shape = str(rng.choice([s for s in scenes.SHAPES if s not in (first.shape, second.shape)]))
        changed = scenes.edit_thing(one, 0, shape=shape)
        less = scenes.remove_thing(one, 1)
        out.append([Task(SHAPE, one, changed), Task(MOVE, one, moved), Task(ADDITION, less, one)])
    return out


# ---- what a picture shows ----------------------------------------------------------------------------------------


def succeeded(task, picture):
    """Whether a picture shows the target: each object in its place and colour, what changed in its shape too, on the
    right background, and nothing else."""
    background, found = checker.look(picture)
    if background != task.target.background or len(found) > len(task.target.things):
        return False
    for thing, mask in zip(task.target.things, scenes.render(task.target)[1], strict=True):
        seen = max(found, key=lambda f: overlap(f.mask, mask > 0.5), default=None)
        if seen is None or overlap(seen.mask, mask > 0.5) < OVERLAP or seen.color != thing.color:
            return False
        if thing not in task.source.things and seen.shape != thing.shape:
            return False
    return True


def outline_of(task, picture):
    """How well the new thing fills its outline: intersection over union with the best object of the picture."""
    masks = zip(task.target.things, scenes.render(task.target)[1], strict=True)
    (new,) = (mask > 0.5 for thing, mask in masks if thing not in task.source.things)
    return max((float(overlap(f.mask, new)) for f in checker.look(picture)[1]), default=0.0)


def mark(task, picture, source):
    """A picture's figures. Outside is what a mask of the usual size leaves alone, beside the source as decoded. The
    seam is how far the steps from pixel to pixel lie from the truth's, in thousandths, where the mask's latent pixels
    end."""
    truth = scenes.render(task.target)[0]
    mask = replace(task, grow=GROW).mask[0].numpy() > 0
    return {
        "success %": 100.0 * succeeded(task, picture),
        "new outline IoU": outline_of(task, picture),
        "L1": float(np.abs(picture - truth).mean()),
        "L2": float(np.square(picture - truth).mean()),
        "outside dB": decibels_in(picture, source, ~mask),
        "seam": seam_of(picture - truth, mask),
    }


def seam_of(error, mask):
    """The mean step from pixel to pixel, in thousandths, of an ``error`` (H, W, 3) within SEAM pixels of the border of
    the latent pixels that a boolean ``mask`` (H, W) touches; 0 where they have none."""
    rows, columns = (side // CELL for side in mask.shape)
    touched = mask.reshape(rows, CELL, columns, CELL).any((1, 3)).repeat(CELL, 0).repeat(CELL, 1)
    inner, outer = (binary_dilation(one, iterations=SEAM) for one in (~touched, touched))
    found = []
    for axis in (0, 1):
        lower = [slice(None), slice(None)]
        lower[axis] = slice(-1)
        found.append(np.abs(np.diff(error, axis=axis))[(inner & outer)[tuple(lower)]].ravel())
    steps = np.concatenate(found)
    return 1000.0 * float(steps.mean()) if steps.size else 0.0


def average(marks):
    return {key: round(float(np.mean([m[key] for m in marks])), 4) for key in marks[0]}


def summed(marks):
    """The averages, and the 95 % interval of each: Wilson's for a share, by resampling the edits for the rest."""
    return average(marks) | {"95 %": {key: interval_of(key, [m[key] for m in marks]) for key in marks[0]}}


def interval_of(key, values):
    if key == "success %":
        return wilson(sum(v > 50 for v in values), len(values))
    return resampled(values)


def wilson(hits, count, z=1.96):
    """The 95 % interval of a share, in percent, of ``hits`` in ``count`` > 0."""
    share, wide = hits / count, z * z / count
    middle, reach = share + wide / 2, z * (share * (1 - share) / count + wide / (4 * count)) ** 0.5
    return [round(100 * (middle + sign * reach) / (1 + wide), 1) for sign in (-1, 1)]


def resampled(values):
    """The 95 % interval of a mean, from RESAMPLED draws with replacement."""
    rng, values = np.random.default_rng(0), np.asarray(values, float)
    means = values[rng.integers(len(values), size=(RESAMPLED, len(values)))].mean(1)
    return [round(float(q), 4) for q in np.quantile(means, (0.025, 0.975))]


def difference(ours, theirs):
    """How much more one method's marks are than another's, edit by edit, with the 95 % interval of the mean."""
    pairs = {key: [a[key] - b[key] for a, b in zip(ours, theirs, strict=True)] for key in ours[0]}
    return {key: [round(float(np.mean(values)), 4), *resampled(values)] for key, values in pairs.items()}


# ---- the methods -------------------------------------------------------------------------------------------------


class Room:
    """The bench, the adapter, and ways to draw a task."""

    def __init__(self, studio, guidance):
        self.studio, self.bench, self.guidance = studio, studio.bench, guidance
        self.adapter = call(stock.ControlNetLoader, ADAPTER.name)[0]
        self.empty = self.bench.text("")

    def adapted(self, prompt, sketch, strength=1.0):
        """Positive and negative under the adapter."""
        return call(
            stock.ControlNetApplyAdvanced, self.bench.text(prompt), self.empty, self.adapter, sketch, strength, 0.0, 1.0
        )

    def fuse(
        self, task, trajectory, seed, start_noise=fusion.NOISES[0], start=0.08, layer=10, guidance=None,
        queries=fusion.QUERIES[0],
    ):  # fmt: skip
        """MaSaFusion: (the latent drawn, the intermediate picture, what the sampler was given)."""
        guidance, window = guidance or self.guidance, (start, 1.0, layer)
        before, after = map(self.bench.text, task.prompts)
        intermediate, seen = call(
            fusion.AttuneIntermediate, self.bench.model, trajectory, after, self.empty, self.adapter, task.sketch,
            task.mask, self.bench.vae, seed, guidance, 1.0, 0.0, 1.0, fusion.BOTH, start_noise, *window, before,
            queries,
        )  # fmt: skip
        settings = *window, before, queries
        given = call(fusion.AttuneMaskedFusion, self.bench.model, trajectory, intermediate, task.mask, *settings)
        return self.sample(*given, guidance), seen, given

    def fuse_alone(self, task, trajectory, start=0.0, layer=10, end=1.0, masked=True, queries=fusion.QUERIES[0]):
        before, after = map(self.bench.text, task.prompts)
        given = call(
            fusion.AttuneSourceFusion, self.bench.model, trajectory, after, self.empty, start, end, layer,
            task.mask if masked else None, before, queries,
        )  # fmt: skip
        return self.sample(*given, self.guidance)

    def sample(self, model, positive, negative, latent, sigmas, guidance):
        euler = call(custom.KSamplerSelect, "euler")[0]
        return call(custom.SamplerCustom, model, False, 0, guidance, positive, negative, euler, sigmas, latent)[0]

    def from_noise(self, positive, negative, seed, latent=None):
        """The stock sampler from a seed, inside the latent's noise mask if it has one."""
        settings = seed, self.bench.steps, self.guidance, "euler", "ddim_uniform"
        latent = latent or {"samples": torch.zeros(1, 4, 16, 16)}
        return call(stock.KSampler, self.bench.model, *settings, positive, negative, latent)[0]

    def masa(self, task, trajectory, sketched):
        """MasaCtrl with its paper's window, from the source's noise, with or without the sketch."""
        model, positive = call(
            self_attention.AttuneMutualSelfAttention, self.bench.model, self.bench.clip, trajectory, "",
            task.prompts[1], 0.08, 1.0, 10,
        )  # fmt: skip
        negative = self.empty
        if sketched:
            settings = self.adapter, task.sketch, 1.0, 0.0, 1.0
            positive, negative = call(stock.ControlNetApplyAdvanced, positive, negative, *settings)
        return self.sample(
            model, positive, negative, start_of(self.bench, trajectory), trajectory.sigmas, self.guidance
        )

    def exchange(self, task, trajectory):
        """Prompt-to-Prompt as its paper has it; words are added by refinement."""
        node = edit.AttunePromptRefine if task.kind == ADDITION else edit.AttunePromptSwap
        model, positive = call(
            node, self.bench.model, self.bench.clip, trajectory, *task.prompts, 0.0, 0.8, 0.0, 0.4, 1024
        )
        latent = start_of(self.bench, trajectory)
        return self.sample(model, positive, self.empty, latent, trajectory.sigmas, self.guidance)

    def inpaint(self, task, seed, sketched):
        """The stock sampler inside the mask, from a seed."""
        latent = self.bench.encode(torch.from_numpy(scenes.render(task.source)[0])[None])
        latent = call(stock.SetLatentNoiseMask, latent, task.mask)[0]
        after = task.prompts[1]
        texts = self.adapted(after, task.sketch) if sketched else (self.bench.text(after), self.empty)
        return self.from_noise(*texts, seed, latent)

    def draw(self, method, task, runs, seed):
        """A method's latent. ``runs`` are the source's trajectories by the way they were made."""
        direct, null_text, uncaptioned = runs
        makers = {
            NULL_TEXT: lambda: self.fuse(task, null_text, seed)[0],
            DIRECT: lambda: self.fuse(task, direct, seed)[0],
            DIRECT_OWN: lambda: self.fuse(task, direct, seed, queries=fusion_rules.OWN)[0],
            ALONE: lambda: self.fuse_alone(task, direct),
            ALONE_OWN: lambda: self.fuse_alone(task, direct, queries=fusion_rules.OWN),
            ADAPTED: lambda: self.from_noise(*self.adapted(task.prompts[1], task.sketch), seed),
            MASA: lambda: self.masa(task, uncaptioned, sketched=False),
            MASA_SKETCH: lambda: self.masa(task, uncaptioned, sketched=True),
            P2P: lambda: self.exchange(task, direct),
            INPAINT: lambda: self.inpaint(task, seed, sketched=False),
            INPAINT_SKETCH: lambda: self.inpaint(task, seed, sketched=True),
        }
        return makers[method]()


def start_of(bench, trajectory):
    return {"samples": host.to_host_scale(bench.model, trajectory.noise)}


def no_text(scene):
    return ""


def runs_of(studio, drawn, name, guidance):
    """For each scene, its trajectories: inverted under its caption, with null embeddings too, and without a text."""
    plain, learned = studio.invert(drawn, name), studio.invert(drawn, name, guidance)
    empty = studio.invert(drawn, f"{name} uncaptioned", text=no_text)
    return list(zip(plain, learned, empty, strict=True))


def save_sheet(name, pictures, columns):
    save(name, [torch.from_numpy(np.ascontiguousarray(p)) for p in pictures], columns)


# ---- the parts ---------------------------------------------------------------------------------------------------


def fidelity(room, count, seed):
    """IoU of each true object with the best of the picture, and what the picture shows, with and without adapter."""
    rng, found = np.random.default_rng([seed, 17, 0]), {}
    drawn = [scenes.draw_scene(rng, held_out=True) for _ in range(count)]
    shown = []
    for i, one in enumerate(drawn):
        masks = scenes.render(one)[1]
        sketch = sketch_of(torch.from_numpy(masks))
        for name, strength in (("with the adapter", 1.0), ("without", 0.0)):
            texts = room.adapted(scenes.caption(one), sketch, strength)
            picture = room.studio.keep(
                f"adapter {i} {name}", lambda t=texts, i=i: room.bench.decode(room.from_noise(*t, i))
            )
            seen = checker.look(picture)[1]
            best = [max((float(overlap(f.mask, m > 0.5)) for f in seen), default=0.0) for m in masks]
            grade = {k: 100.0 * v for k, v in checker.grade(picture, one).items()}
            found.setdefault(name, []).append({"outline IoU": float(np.mean(best)), **grade})
            shown += [sketch[0].numpy(), picture] if strength else [picture]
    save_sheet("fusion_adapter.png", shown[:48], 6)
    return {name: average(rows) for name, rows in found.items()}


def settings(room, count, seed):
    """Windows and guidance of the direct method."""
    asked = draw_tasks(count, seed, SETTINGS)
    sources = {k: room.studio.invert([row[KINDS.index(k)].source for row in asked], f"settings {k}") for k in KINDS}
    found = {}
    for guidance in (2.0, 3.0):
        for window in (PAPERS, {"start": 0.0, "layer": 0}, {"start": 0.0, "layer": 10}):
            name = f"guidance {guidance:g}, from step {window['start']:g}, layer {window['layer']}"
            marks = []
            for i, row in enumerate(asked):
                for task in row:
                    run = sources[task.kind][i]

                    def make(task=task, run=run, window=window, i=i, guidance=guidance):
                        return room.bench.decode(room.fuse(task, run, i, guidance=guidance, **window)[0])

                    picture = room.studio.keep(f"settings {i} {task.kind}, {name}", make)
                    marks.append(mark(task, picture, room.studio.source(f"settings {i} {task.kind} source", run)))
            found[name] = summed(marks)
            log.info("%s: %s", name, found[name])
    return found


def edits(room, count, seed, methods=METHODS):
    asked, found, sheets = draw_tasks(count, seed, TEST), {}, {kind: [] for kind in KINDS}
    for kind in KINDS:
        tasks = [row[KINDS.index(kind)] for row in asked]
        runs = runs_of(room.studio, [task.source for task in tasks], f"edits {kind} {count}", room.guidance)
        for i, task in enumerate(tasks):
            source = room.studio.source(f"edits {i} {kind} source", runs[i][0])
            truth = room.studio.truth(f"edits {i} {kind} truth", task.target)
            found.setdefault((kind, TRUTH), []).append(mark(task, truth, source))
            strip = [source, task.sketch[0].numpy(), truth]
            for method in methods:
                name = f"edits {i} {kind}, {method}"
                picture = room.studio.keep(
                    name, lambda m=method, t=task, i=i, runs=runs: room.bench.decode(room.draw(m, t, runs[i], i))
                )
                found.setdefault((kind, method), []).append(mark(task, picture, source))
                strip.append(picture)
            sheets[kind] += strip if i < 6 else []
            log.info("%s %d of %d", kind, i + 1, len(tasks))
        save_sheet(f"fusion_{kind}.png", sheets[kind], len(strip))
    table = {kind: {method: summed(marks) for (k, method), marks in found.items() if k == kind} for kind in KINDS}
    whole = {m: [x for k in KINDS for x in found[k, m]] for m in (TRUTH, *methods)}
    pairs = [(DIRECT, DIRECT_OWN), (ALONE, ALONE_OWN), (NULL_TEXT, DIRECT), (DIRECT, MASA_SKETCH),
             (DIRECT, INPAINT_SKETCH)]  # fmt: skip
    less = {f"{a} - {b}": difference(whole[a], whole[b]) for a, b in pairs if {a, b} <= set(methods)}
    return {**table, "all": {m: summed(marks) for m, marks in whole.items()}, "differences": less}


def noises(room, count, seed):
    """The intermediate and the target by where the intermediate starts; a sheet of source, sketch, intermediate, target
    and the adapter alone."""
    asked, found, sheet, compared = draw_tasks(count, seed, TEST), {}, [], []
    for kind in KINDS:
        tasks = [row[KINDS.index(kind)] for row in asked]
        runs = room.studio.invert([task.source for task in tasks], f"edits {kind} {count}")
        for i, task in enumerate(tasks):
            source = room.studio.source(f"edits {i} {kind} source", runs[i])
            sheet += [source, task.sketch[0].numpy()]
            compared += [source, task.sketch[0].numpy()]
            for noise in fusion.NOISES:
                pair = pair_of(room, f"noise {i} {kind}, {noise}", task, runs[i], i, start_noise=noise)
                for what, picture in zip(("intermediate", "target"), pair, strict=True):
                    found.setdefault(f"{what}, {noise}", []).append(mark(task, picture, source))
                sheet += pair
                compared += pair if noise == fusion.NOISES[0] else []

            def alone(task=task, i=i):
                return room.bench.decode(room.from_noise(*room.adapted(task.prompts[1], task.sketch), i))

            compared.append(room.studio.keep(f"noise {i} {kind}, {ADAPTED}", alone))
            found.setdefault(ADAPTED, []).append(mark(task, compared[-1], source))
    save_sheet("fusion_noise.png", sheet, 8)
    save_sheet("fusion_stages.png", compared, 5)
    return {name: summed(rows) for name, rows in found.items()}


def pair_of(room, name, task, run, seed, **how):
    """The intermediate and the target picture."""
    made = []

    def draw(which):
        if not made:
            latent, seen, _ = room.fuse(task, run, seed, **how)
            made.extend((seen, room.bench.decode(latent)))
        return made[which]

    return [
        room.studio.keep(f"{name}, {part}", lambda n=n: draw(n)) for n, part in enumerate(("intermediate", "target"))
    ]


def regions(room, count, seed, grows=(-4, 0, GROW, 16, 32, 128)):
    asked, found, sheet = draw_tasks(count, seed, TEST), {}, []
    for kind in KINDS:
        tasks = [row[KINDS.index(kind)] for row in asked]
        runs = room.studio.invert([task.source for task in tasks], f"edits {kind} {count}")
        for i, task in enumerate(tasks):
            source = room.studio.source(f"edits {i} {kind} source", runs[i])
            sheet.append(source)
            for grow in grows:
                sized = replace(task, grow=grow)
                _, picture = pair_of(room, f"region {i} {kind}, {grow}", sized, runs[i], i)
                found.setdefault(f"{grow} px", []).append(
                    mark(task, picture, source) | {"mask %": 100 * float(sized.mask.mean())}
                )
                sheet.append(picture)
    save_sheet("fusion_region.png", sheet, len(grows) + 1)
    return {name: summed(rows) for name, rows in found.items()}


def shares(room, count, seed, ends=(0.0, 0.2, 0.4, 0.6, 1.0)):
    """Without an intermediate, by the share of the steps in which the source is read, in the mask and without one."""
    asked, found, sheet = draw_tasks(count, seed, TEST), {}, []
    for kind in KINDS:
        tasks = [row[KINDS.index(kind)] for row in asked]
        runs = room.studio.invert([task.source for task in tasks], f"edits {kind} {count}")
        for i, task in enumerate(tasks):
            source = room.studio.source(f"edits {i} {kind} source", runs[i])
            for masked, where in ((False, "everywhere"), (True, "in the mask")):
                sheet.append(source)
                for end in ends:

                    def make(task=task, run=runs[i], end=end, masked=masked):
                        return room.bench.decode(room.fuse_alone(task, run, end=end, masked=masked))

                    picture = room.studio.keep(f"steps {i} {kind}, {where} {end:g}", make)
                    found.setdefault(f"{where}, to {end:g}", []).append(mark(task, picture, source))
                    sheet.append(picture)
    save_sheet("fusion_steps.png", sheet, len(ends) + 1)
    return {name: summed(rows) for name, rows in found.items()}


def five(scene, rng):
    """Five scenes, each an edit of the one before it: both objects' shapes and colours in turn."""
    steps = [scene]
    for index, what in ((0, "shape"), (1, "color"), (1, "shape"), (0, "color"), (0, "shape")):
        now = steps[-1]
        taken = {t.shape for t in now.things} | {t.color for t in now.things} | {now.background}
        names = scenes.SHAPES if what == "shape" else scenes.COLORS
        steps.append(scenes.edit_thing(now, index, **{what: str(rng.choice([n for n in names if n not in taken]))}))
    return steps


def turns(room, count, seed):
    """After each turn, what lies outside all masks so far, beside the very first picture."""
    rng, found, sheet = np.random.default_rng([seed, 17, TURNS]), {}, []
    for i in range(count):
        scene = draw_tasks(count, seed, TURNS)[i][0].source
        steps = five(scene, rng)
        first = torch.from_numpy(scenes.render(scene)[0])[None]
        start = room.bench.invert(room.bench.encode(first), room.bench.text(scenes.caption(scene)))[0]
        ours = theirs = start
        done, union, strips = None, np.zeros((scenes.SIZE,) * 2, bool), ([first[0].numpy()], [first[0].numpy()])
        for number, (before, after) in enumerate(zip(steps[:-1], steps[1:], strict=True), 1):
            task = Task(SHAPE, before, after)
            union |= task.mask[0].numpy() > 0
            given = room.fuse(task, ours, i)[2]
            model, positive, negative, latent, sigmas = given
            euler = host.euler()
            edited = call(invert.AttuneRecordTrajectory, model, False, 0, room.guidance, positive, negative, euler,
                          sigmas, latent)[0]  # fmt: skip
            ours, shown, done, _ = call(fusion.AttuneNextTurn, ours, edited, task.mask, first, room.bench.vae, 4, done)
            unpasted = host.decode(room.bench.vae, ours, ours.latents[-1])
            decoded = room.bench.decode(room.fuse(task, theirs, i)[0])
            again = room.bench.encode(decoded.mul(255).round().div(255))
            theirs = room.bench.invert(again, room.bench.text(task.prompts[1]))[0]
            pictures = {"next turn": shown, "next turn, not pasted": unpasted, "decode and encode": decoded}
            for name, picture in pictures.items():
                pixels = picture[0].clamp(0, 1).numpy()
                outside = pixels[~union]
                same = bool((outside == first[0].numpy()[~union]).all())
                found.setdefault(f"{name}, turn {number}", []).append(
                    {
                        "exact %": 100.0 * same,
                        "outside dB": 99.0 if same else decibels_in(pixels, first[0].numpy(), ~union),
                        "shapes and colours %": 100.0 * checker.grade(pixels, after)["shapes"],
                        "L1": float(np.abs(pixels - scenes.render(after)[0]).mean()),
                    }
                )
            strips[0].append(shown[0].clamp(0, 1).numpy())
            strips[1].append(decoded[0].clamp(0, 1).numpy())
        sheet += strips[0] + strips[1]
        log.info("turns of scene %d: %s", i + 1, {k: v[-1] for k, v in found.items()})
    save_sheet("fusion_turns.png", sheet, 6)
    return {name: average(rows) for name, rows in found.items()}


def cost(room, count, seed):
    """UNet rows a step of each stage, and the seconds of whole edits by their inversion."""
    asked, bench = draw_tasks(count, seed, TEST), room.bench
    stages, seconds = {}, {}

    def timed(name, make, *args):
        clock = Clock(bench.model.model.diffusion_model)
        with clock.running():
            out = make(*args)
        rows = sum(clock.rows.values()) / bench.steps
        stages.setdefault(name, []).append({"rows a step": round(rows, 2), "seconds": clock.total})
        return out

    for i in range(count):
        task, window = asked[i][0], (0.08, 1.0, 10)
        before, after = map(bench.text, task.prompts)
        latent = bench.encode(torch.from_numpy(scenes.render(task.source)[0])[None])
        how = bench.steps, invert.GRIDS[0], invert.LEVELS[0]
        (direct, *_) = timed("DDIM inversion", call, invert.AttuneDDIMInversion, bench.model, latent, before, *how)
        nti = bench.model, room.empty, room.guidance, 10, 0.01, 1e-5, True
        learned, _ = timed("null-text", call, invert.AttuneNullTextInversion, direct, *nti)
        led = room.adapter, task.sketch, task.mask, bench.vae, i, room.guidance, 1.0, 0.0, 1.0
        for name, run in ((DIRECT, direct), (NULL_TEXT, learned)):
            begin = time.perf_counter()
            settings = run, after, room.empty, *led, fusion.BOTH, fusion.NOISES[0], *window, before
            made, _ = timed(f"intermediate, {name}", call, fusion.AttuneIntermediate, bench.model, *settings)
            given = call(fusion.AttuneMaskedFusion, bench.model, run, made, task.mask, *window, before)
            timed(f"fusion, {name}", room.sample, *given, room.guidance)
            seconds.setdefault(name, []).append(time.perf_counter() - begin)
        timed("without intermediate", room.fuse_alone, task, direct)
        plain = bench.model, before, room.empty, start_of(bench, direct), direct.sigmas
        timed("stock sampling", room.sample, *plain, room.guidance)
    out = {name: average(rows) for name, rows in stages.items()}
    inverted, learned = out["DDIM inversion"]["seconds"], out["null-text"]["seconds"]
    whole = {
        DIRECT: inverted + float(np.mean(seconds[DIRECT])),
        NULL_TEXT: inverted + learned + float(np.mean(seconds[NULL_TEXT])),
    }
    return {
        "stages": out,
        "whole edit, seconds": {name: round(value, 1) for name, value in whole.items()},
        "null-text / direct": round(whole[NULL_TEXT] / whole[DIRECT], 2),
        "the paper's": round(184.2 / 43.9, 2),
    }


PARTS = {
    "adapter": (fidelity, 48),
    "settings": (settings, 4),
    "edits": (edits, 16),
    "noise": (noises, 8),
    "region": (regions, 8),
    "steps": (shares, 8),
    "turns": (turns, 6),
    "cost": (cost, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--count", type=int, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the pictures that a stopped run left")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    measure, count = PARTS[args.part]
    count = args.count or count
    folder = RUN / "fusion" / args.part
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    with torch.inference_mode():
        room = Room(Studio(args.steps, args.seed, folder), args.guidance)
        found = measure(room, count, args.seed)
    log.info(json.dumps(found, indent=1))
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"scenes": count, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    RESULTS.write_text(json.dumps(kept | {args.part: about | found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
