"""Every method beside its papers' procedure, in one table. Run through ``python3 dev.py bench faithfulness``.

Same weights, same noise, same choices on both sides: what the pack's nodes and the stock sampler draw, and what the
plain implementations draw, which are written from the papers' equations on diffusers and transformers and share no code
with the pack (:mod:`reference`, :mod:`reference_p2p`, :mod:`reference_self`, :mod:`reference_tokens`,
:mod:`reference_fusion`, :mod:`reference_preserving`, :mod:`reference_regions`). A row holds where the two lie no
further apart than its bound, which must itself be far below what the method changes. Rows about departures hold where
the pack is as the paper has it and not as its code does. Rows about choices are of what the pack does otherwise than
the paper: they hold where the plain implementation, told the same, draws the same, and say how far that is from the
paper's own.

The table is printed and written to benchmark/FAITHFULNESS.md; with ``--only`` it is printed. The exit code is 1 where a
row does not hold.
"""

import argparse
import datetime
import functools
import importlib.metadata
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

import nodes as stock

from ..attention_patches import alignment, proximal
from ..attention_patches import host as patches
from ..attention_patches import masked_fusion as fusion_rules
from ..attention_patches.values import attention_map, first_step
from ..demo import model as demo_model
from ..demo import scenes
from ..demo.measure import Bench, call
from ..demo.text import HEADS
from ..inversion import ddim, dynamic_prompt, host, null_text
from ..inversion.trajectory import negative_of
from ..nodes import edit, fusion, guidance, invert, self_attention, tokens
from ..nodes import mask as mask_nodes
from . import dynamic_prompt as words
from . import editing_parity, families_parity, inversion, reference, reference_p2p, self_parity
from . import fusion as fusion_bench
from . import reference_fusion as masa
from . import reference_preserving as cpam
from . import reference_regions as regional
from . import reference_tokens as dpl
from .inversion import GRIDS, LEVELS, relative

PAGE = Path(__file__).parent / "FAITHFULNESS.md"
SAME = 1e-4  # of the latents' size; rounding leaves a twentieth of it
LOSS = 1e-3  # of a loss
LEARNED = 1e-3  # what Adam learns: its first steps are the gradient's sign, which rounding turns where it is nearly 0
MARGIN = 10  # a bound is at least so many times below what the method changes
INTERMEDIATE, TARGET = "intermediate picture", "target"
IN_MASK, EVERYWHERE = "without adapter, in a mask", "without adapter or mask"
FIRST, LAYER = 0.08, 10  # MasaCtrl's window
# Updates of words and of nulls a step. The demo model's words want ten times the papers' rate, but then updates
# overshoot, and the plain implementation beside itself, begun a ten-millionth off, comes out 0.3 % elsewhere.
INNER, WORD_RATE = 5, 0.001
log = logging.getLogger("attune.bench")


@dataclass(frozen=True)
class Check:
    """One row. ``measure(number)`` gives, for the held-out scene ``number``, how far the two sides lie apart and how
    large the method's own effect is, both in the same measure; for a departure, how far the pack lies from the paper
    and from the authors' code. ``once``: no scene matters. ``departs``: why. ``printed``: it departs from the page, or
    fills in what the page leaves open; how far the pack lies from the plain implementation that is told the same, and
    that from the plain one as printed."""

    method: str
    paper: str
    compared: str
    measure: Callable
    bound: float = SAME
    once: bool = False
    departs: str = ""
    printed: bool = False

    @property
    def name(self):
        return f"{self.method}, {self.compared}"


@dataclass(frozen=True)
class Row:
    """What came out of a :class:`Check`: the largest distance and the smallest effect over the scenes."""

    check: Check
    distance: float
    effect: float

    @property
    def holds(self):
        return self.distance <= self.check.bound and self.effect > MARGIN * self.check.bound


# ---- both sides --------------------------------------------------------------------------------------------------


class Sides(self_parity.Sides):
    """As :class:`self_parity.Sides`, with the first runs of every method; what was drawn once is kept."""

    def __init__(self, bench):
        super().__init__(bench)
        self.prompts = editing_parity.Sides(bench)
        self.scenes, self.pictures, self.masks = bench.scenes(objects=2)
        self.tasks = [kinds[0] for kinds in fusion_bench.draw_tasks(bench.count, bench.seed, fusion_bench.TEST)]
        self.weights = demo_model.read_weights()
        for name in ("learn_nulls", "plain_nulls", "learn_words", "look", "task", "intermediate", "fuse"):
            setattr(self, name, functools.cache(getattr(self, name)))

    def caption(self, number):
        return scenes.caption(self.scenes[number])

    def plain(self, trajectory):
        """A trajectory's latents in diffusers' coordinates."""
        path = trajectory.latents / (1 + trajectory.sigmas**2).sqrt().view(-1, 1, 1, 1, 1)
        return list(path.unbind())

    def whole(self, trajectory):
        """The same with the papers' last step, which is onto itself, where the grid has one."""
        path = self.plain(trajectory)
        return path + [path[-1]] * (self.bench.steps + 1 - len(path))

    def sample(self, model, positive, negative, trajectory):
        """The LATENT that the stock sampler draws."""
        rest = self.euler, trajectory.sigmas, {"samples": host.host_latent(trajectory, 0)}
        return call(custom.SamplerCustom, model, False, 0, self.bench.guidance, positive, negative, *rest)[0]

    def way(self, model, positive, negative, sigmas, noise):
        """The latents that the stock sampler visits, in diffusers' coordinates, and the noise that each step saw."""
        settings = False, 0, self.bench.guidance, positive, negative, self.euler, sigmas, noise
        made = call(invert.AttuneRecordTrajectory, model, *settings)[0]
        return self.plain(made), predictions(made)

    # -- inversions

    def learn_nulls(self, number, grid):
        """The pack's trajectory with null embeddings."""
        trajectory = self.invert(number, self.caption(number), grid, False)
        settings = self.empty, self.bench.guidance, INNER, 0.01, 0.0, True
        return call(invert.AttuneNullTextInversion, trajectory, self.bench.model, *settings)[0]

    def plain_nulls(self, number, grid, tolerance=-1.0, inner=INNER):
        """The reference's null embeddings, one a step, its losses and the last latent of its guided run."""
        trajectory = self.invert(number, self.caption(number), grid, False)
        texts = trajectory.conditioning[0][0].float(), self.empty[0][0].float()
        settings = self.bench.guidance, inner, tolerance
        with torch.enable_grad():
            nulls, losses, last = reference.null_text(
                self.network, GRIDS[grid], self.whole(trajectory), *texts, *settings, early_stop=tolerance >= 0
            )
        # On the papers' grid the last step is onto itself, and there is nothing to learn.
        count = len(trajectory.sigmas) - 1
        return nulls[:count], losses[:count], last

    # -- words

    def nouns(self, number):
        """The caption as the reference reads it, and the columns of each of its nouns."""
        prompt = self.prompt(self.caption(number))
        pairs = zip(prompt.text.split(" "), prompt.words, strict=True)
        return prompt, [columns for word, columns in pairs if word in scenes.SHAPES]

    def learn_words(self, number):
        """(pack's progress, reference's four results, start vectors, null embedding) of Dynamic Prompt Learning."""
        scene, caption = self.scenes[number], self.caption(number)
        _, nouns = self.nouns(number)
        outside = self.outside(number)
        trajectory = self.invert(number, caption, host.HOST_GRID, False)
        settings = dynamic_prompt.DynamicPrompt(inner=INNER, rate=WORD_RATE)
        nulls = null_text.NullText(self.bench.guidance, inner=INNER)
        batch = words.Batch(
            [scene], [caption], [[tuple(columns) for columns in nouns]], self.pictures[number : number + 1],
            [self.masks[number]], trajectory, [outside.expand(len(nouns), -1)],
        )  # fmt: skip
        ours, _ = words.learn(self.bench, batch, settings, nulls)
        null = self.empty[0][0].float()
        theirs, start = self.plain_words(number), self.plain_encoder(number)[1]
        return ours, theirs, start, null

    def plain_encoder(self, number):
        """The reference's text encoder with a placeholder for every piece of a noun, and their start vectors."""
        prompt, nouns = self.nouns(number)
        ids = [prompt.ids[column] for columns in nouns for column in columns]
        encoder = dpl.Encoder(self.weights["text"], ids, HEADS)
        return encoder, encoder.table[list(encoder.placeholders)].clone()

    def plain_words(self, number, descent=False):
        """The reference's four results."""
        prompt, nouns = self.nouns(number)
        outside = self.outside(number)
        trajectory = self.invert(number, self.caption(number), host.HOST_GRID, False)
        settings = dpl.Settings(
            inner=INNER, rate=WORD_RATE, guidance=self.bench.guidance, null_inner=INNER, descent=descent
        )
        path, null = self.whole(trajectory), self.empty[0][0].float()
        given = path, prompt.ids, nouns, outside, null, settings
        with torch.enable_grad():
            return dpl.learn(self.network, self.plain_encoder(number)[0], GRIDS[host.HOST_GRID], *given)

    def outside(self, number):
        """(256,): 1 where no noun may look."""
        outside = torch.nn.functional.adaptive_max_pool2d(1 - self.masks[number].amax(0)[None], (16, 16))
        return (outside.flatten() >= 0.5).float()

    def look(self, number):
        """(pack's mean cross-attention (T, N) and self-attention (N, N), the reference's) along an inversion."""
        trajectory = self.invert(number, self.caption(number), host.HOST_GRID, False)
        found, parts = words.token_maps(
            self.bench, trajectory.conditioning, trajectory.latents, trajectory.sigmas, reference_p2p.CHUNK
        )
        text = trajectory.conditioning[0][0].float()
        cross, own = dpl.statistics(self.network, GRIDS[host.HOST_GRID], self.whole(trajectory), text)
        return found[:, 0].flatten(1).T, parts.average()[0], cross, own

    # -- MaSaFusion

    def task(self, number, learned):
        """The pack's inversion of a task's picture, and all that the reference is told."""
        bench, task = self.bench, self.tasks[number]
        picture = torch.from_numpy(scenes.render(task.source)[0])[None]
        trajectory = bench.invert(bench.encode(picture), bench.text(task.prompts[0]))[0]
        if learned:
            settings = self.empty, bench.guidance, INNER, 0.01, 1e-5, True
            trajectory = call(invert.AttuneNullTextInversion, trajectory, bench.model, *settings)[0]
        null, (source, target) = self.empty[0][0], (self.prompt(text).embedding for text in task.prompts)
        nulls = [null] if trajectory.nulls is None else list(trajectory.nulls)
        region = task.mask[0].unflatten(0, (16, 8)).unflatten(2, (16, 8)).ge(0.5).any(3).any(1)
        net = masa.adapter(comfy.utils.load_torch_file(str(demo_model.ADAPTER)), demo_model.ADAPTER_CHANNELS)
        residuals = masa.features(net, task.sketch[..., 0][None], self.network.config.block_out_channels)
        edit = masa.Edit(source, target, null, region, (residuals, residuals))
        return trajectory, masa.Run(self.whole(trajectory), source, nulls), edit

    def told(self, queries=masa.SOURCES, end=1.0):
        """The reference's settings."""
        steps = self.bench.steps
        window = int(FIRST * steps), int(end * steps)
        return masa.Settings(GRIDS[host.HOST_GRID], steps, self.bench.guidance, *window, LAYER, queries)

    def intermediate(self, number, learned, queries):
        """The intermediate picture of equation 9, from gaussian noise: the pack's trajectory, and the reference's
        latents, mixed predictions and latents without any reading."""
        bench, task = self.bench, self.tasks[number]
        trajectory, source, edit = self.task(number, learned)
        made = call(
            fusion.AttuneIntermediate, bench.model, trajectory, bench.text(task.prompts[1]), self.empty,
            call(stock.ControlNetLoader, demo_model.ADAPTER.name)[0], task.sketch, task.mask, bench.vae, number,
            bench.guidance, 1.0, 0.0, 1.0, fusion.BOTH, fusion_rules.GAUSSIAN, FIRST, 1.0, LAYER, None, queries,
        )[0]  # fmt: skip
        x = self.plain(made)[0]
        alone = replace(edit, source=edit.target)
        plain, _ = masa.draw(self.network, self.told(), alone, x)
        return made, *masa.intermediate(self.network, self.told(queries), edit, source, x), plain

    def fuse(self, name, number, learned, queries):
        """(pack's latents, its predictions, reference's latents, its mixed predictions, latents without any reading)"""
        bench, task = self.bench, self.tasks[number]
        trajectory, source, edit = self.task(number, learned)
        if name == INTERMEDIATE:
            made, *theirs = self.intermediate(number, learned, queries)
            return self.plain(made), predictions(made), *theirs
        if name == TARGET:
            # From the source's noise outside and the same gaussian noise inside.
            made, latents, *_ = self.intermediate(number, learned, queries)
            node = fusion.AttuneMaskedFusion, made, task.mask, FIRST, 1.0, LAYER, None, queries
            theirs = masa.target(self.network, self.told(queries), edit, source, latents)
        else:
            # In the mask the source may be read in all steps; in the whole picture, in some.
            mask, end = (task.mask, 1.0) if name == IN_MASK else (None, 0.4)
            region = edit.region if name == IN_MASK else torch.ones_like(edit.region)
            edit = replace(edit, region=region, residuals=(None, None))
            texts = bench.text(task.prompts[1]), self.empty
            node = fusion.AttuneSourceFusion, *texts, FIRST, end, LAYER, mask, None, queries
            theirs = masa.without_intermediate(self.network, self.told(queries, end), edit, source)
        fused, positive, negative, noise, sigmas = call(node[0], bench.model, trajectory, *node[1:])
        alone = replace(edit, source=edit.target)
        plain, _ = masa.draw(self.network, self.told(), alone, theirs[0][0])
        return *self.way(fused, positive, negative, sigmas, noise), *theirs, plain


def predictions(trajectory):
    """The noise that was predicted in each step, for a trajectory that was drawn with euler."""
    return list((trajectory.latents.diff(dim=0) / trajectory.sigmas.diff().view(-1, 1, 1, 1, 1)).unbind())


def furthest(ours, theirs):
    """The largest relative distance of tensors, pair by pair. The reference may have one more, of the papers' last step
    onto itself; any other difference in number is infinite."""
    if len(theirs) - len(ours) not in (0, 1):
        return math.inf
    return greatest(relative(a, b) for a, b in zip(ours, theirs, strict=False))


def greatest(numbers):
    """The greatest, or not-a-number where one of them is none, which max() may pass over."""
    return float(torch.tensor(list(numbers), dtype=torch.float64).max())


def differ(ours, theirs):
    """The share of places where two masks or labels are not the same."""
    return float((ours != theirs).float().mean())


# ---- attention edits ---------------------------------------------------------------------------------------------

P2P = "Hertz et al. 2022, "
PAPERS = {
    "swap": ("Prompt-to-Prompt, word swap", P2P + "section 3.2, word swap"),
    "refine": ("Prompt-to-Prompt, refinement", P2P + "section 3.2, adding a new phrase"),
    "re-weight": ("Prompt-to-Prompt, re-weighting", P2P + "section 3.2, attention re-weighting"),
    "FPE": ("Free-Prompt-Editing", "Liu et al. 2024, algorithms 1 and 2"),
    "MasaCtrl": ("MasaCtrl", "Cao et al. 2023, sections 3.2 and 3.3"),
}
BLEND = "Prompt-to-Prompt, local blend", P2P + "authors' code; null-text's code"
WHY = {
    "what follows a word with more tokens": "the authors' code counts on from the wrong place, so later words read "
    "other words",
    "what follows a word with fewer tokens": "the same",
    "padding that would read a removed word": "the authors' code lets padding look where the removed word looked",
    "a word's window and its factor": "the authors' code bounds the factor of a word by the word's window, too; here a "
    "factor has word_windows of its own, and the same ones there give the same",
    "masks at coarser levels": "the authors' code takes the value in a token's corner; here a token takes the greatest "
    "value in it",
    "masks of words at coarser levels": "the same",
    "a mask between the pixels that are looked at": "the same: a thin mask would be lost",
    "an object with nothing to read": "the authors' code then reads all keys alike, a blur; here a query reads its own "
    "row",
    "a source mask between black and white": "in the authors' code keys between 0 and 1 belong to both object and "
    "background, with the value added to their scores; here they belong to the object from 0.5 on",
}


def source_of(name):
    return BLEND if "blend" in name else next(found for key, found in PAPERS.items() if name.startswith(key))


def edits(sides, module, by):
    """A check for every case of a parity module; ``by`` are its sides."""

    def measure(name, number):
        case = module.cases(sides.scenes[number])[name]
        trajectory = by.trajectory(case, number)
        theirs = by.theirs(case, trajectory)[1]
        return relative(by.ours(case, trajectory), theirs), relative(theirs, undone(case, trajectory))

    def undone(case, trajectory):
        if module is self_parity:
            return by.theirs(replace(case, changed=()), trajectory, plain=True)[1]
        nothing = editing_parity.Case(
            case.target, case.target, editing_parity.NONE, cross=(0.0, 0.0), self_=(0.0, 0.0), grid=case.grid
        )
        return by.theirs(nothing, trajectory)[1]

    def departure(name, number):
        case = module.cases(sides.scenes[number])[name]
        trajectory = by.trajectory(case, number)
        ours = by.ours(case, trajectory)
        return tuple(relative(ours, by.theirs(case, trajectory, quirk=q)[1]) for q in (False, True))

    found = [
        Check(*source_of(name), f"last latents: {name}", functools.partial(measure, name))
        for name in module.cases(sides.scenes[0])
    ]
    return found + [
        Check(*source_of(case), f"{name} ({case})", functools.partial(departure, case), departs=WHY[name])
        for name, case in module.QUIRKS.items()
    ]


def choices(sides):
    """What Free-Prompt-Editing's defaults do otherwise than its paper."""

    def measure(name, changed, number):
        case = self_parity.cases(sides.scenes[number])[name]
        trajectory = sides.trajectory(case, number)
        paper = replace(case, changed=tuple((case.settings | changed).items()))
        theirs, own = (sides.theirs(one, trajectory)[1] for one in (case, paper))
        return relative(sides.ours(case, trajectory), theirs), relative(own, theirs)

    def free_row(number):
        case = self_parity.cases(sides.scenes[number])["FPE"]
        trajectory = sides.trajectory(case, number)
        theirs, own = (sides.theirs(case, trajectory, pinned=pinned)[1] for pinned in (True, False))
        return relative(sides.ours(case, trajectory), theirs), relative(own, theirs)

    method, paper = PAPERS["FPE"]
    return [
        Check(
            method, paper, "steps", functools.partial(measure, "FPE", {"end": 1.0}),
            printed=True,
            departs="the algorithms have every step; the default is until 0.8, as the authors' code has it for real "
            "pictures (end 1 is the algorithms')",
        ),
        Check(
            method, "Liu et al. 2024, section 3.5", "layers",
            functools.partial(measure, "FPE, at most 64 tokens", {"layers": "4-14"}),
            printed=True,
            departs="the paper names layers 4 to 14; the default is the authors' code's rule of tokens, which makes "
            "them 3 to 13 (layers \"4-14\" is the paper's)",
        ),
        Check(
            method, "Liu et al. 2024, algorithm 2", "source row on a real picture", free_row,
            printed=True,
            departs="the algorithm draws it from the noise; here it is pinned to its trajectory, as the authors' code "
            "does",
        ),
    ]  # fmt: skip


def other_families():
    """A check for every case on SDXL and on SD 2.x, whose models are small and random, so that no scene matters."""
    sides = functools.cache(families_parity.Sides)
    return [
        Check(
            *source_of(name),
            f"last latents, {families_parity.STEPS} steps of {families_parity.NAMES[family]}: {name}",
            lambda _, family=family, case=case: sides(family).measure(case),
            once=True,
        )
        for family, cases in families_parity.CASES.items()
        for name, case in cases.items()
    ]


def around_edits(sides):
    """What the edits stand on: the source row, the blend's mask, the maps, the words' alignment."""
    by = sides.prompts

    def source_row(number):
        case = editing_parity.cases(sides.scenes[number])["swap"]
        trajectory = by.trajectory(case, number)
        free, other, _ = by.theirs(case, trajectory)
        return relative(sides.plain(trajectory)[-1], free), relative(other, free)

    def blend_mask(number):
        case = editing_parity.cases(sides.scenes[number])["swap, local blend"]
        trajectory = by.trajectory(case, number)
        latent = host.to_host_scale(sides.bench.model, by.ours(case, trajectory))
        ours = call(edit.AttuneBlendMask, trajectory, {"samples": latent})[0]
        theirs = torch.nn.functional.interpolate(by.theirs(case, trajectory)[2], scale_factor=host.PIXELS)[0]
        return differ(ours, theirs), min(float(theirs.mean()), 1 - float(theirs.mean()))

    def matrices(kind, number):
        apart, effect = 0.0, math.inf
        for name, case in editing_parity.cases(sides.scenes[number]).items():
            if case.kind != kind:
                continue
            read = [patches.read_words(sides.bench.clip, text) for text in (case.source, case.target)]
            prompts = [by.prompt(text) for text in (case.source, case.target)]
            ours = {SWAP: alignment.swap_map, REFINE: alignment.refine_map}[kind](*read)
            theirs = {SWAP: reference_p2p.swap, REFINE: reference_p2p.refine}[kind](*prompts)[0]
            apart = max(apart, float((ours - theirs).abs().max()))
            if "tokens in the new word" in name or kind == REFINE:
                effect = min(effect, float((theirs - torch.eye(len(theirs))).abs().max()))
        return apart, effect

    def free_row(number):
        case = self_parity.cases(sides.scenes[number])["MasaCtrl"]
        trajectory = sides.trajectory(case, number)
        ours = sides.ours(case, trajectory)
        return tuple(relative(ours, sides.theirs(case, trajectory, pinned=p)[1]) for p in (True, False))

    def self_injection(number):
        case = editing_parity.cases(sides.scenes[number])["swap"]
        trajectory = by.trajectory(case, number)
        theirs, printed = (by.theirs(one, trajectory)[1] for one in (case, replace(case, self_=(0.0, 0.0))))
        return relative(by.ours(case, trajectory), theirs), relative(printed, theirs)

    section = P2P + "section 3.2"
    return [
        Check(
            "Prompt-to-Prompt, word swap", section, "self-attention until 0.4", self_injection, printed=True,
            departs="the page exchanges cross-attention alone; the authors' code puts the source's self-attention in, "
            "too, in layers of at most 32x32 tokens, as the defaults here (self_end 0 leaves it out)",
        ),
        Check("Attention maps", P2P + "equation 1", "probabilities of all 32 layers in one pass",
              functools.partial(attention_maps, sides), bound=5e-5),
        Check("Prompt-to-Prompt, word swap", section, "source row", source_row),
        Check(*BLEND, "the last mask", blend_mask, bound=0.0),
        Check("Prompt-to-Prompt, word swap", section, "mapper", functools.partial(matrices, SWAP), bound=1e-6),
        Check("Prompt-to-Prompt, refinement", section, "mapper", functools.partial(matrices, REFINE), bound=1e-6),
        Check(
            *PAPERS["MasaCtrl"], "source row on a real picture", free_row,
            departs="the authors' code lets the source row run freely, so it drifts off the picture; here it is pinned "
            "to its trajectory, which their option and direct inversion do too",
        ),
    ]  # fmt: skip


SWAP, REFINE = editing_parity.SWAP, editing_parity.REFINE


def attention_maps(sides, number):
    """The maps of every layer in one pass half-way along an inversion; the effect is how they differ from those of the
    noise, where they differ least."""
    trajectory = sides.invert(number, sides.caption(number), host.HOST_GRID, False)
    step, found = sides.bench.steps // 2, []

    def receive(place, own, heads):
        found.append(attention_map(own.q, own.k, heads).mean(1)[0])

    def body(denoise, start, report):
        denoise(trajectory.latents[step].to(start), float(trajectory.sigmas[step]))

    picture = host.host_latent(trajectory, -1)
    host.walk(patches.recording(sides.bench.model, receive), trajectory.conditioning, picture, trajectory.sigmas, body)
    theirs = []
    for at in (step, 0):
        t = reference.scheduler(GRIDS[host.HOST_GRID], sides.bench.steps).timesteps[at]
        text = trajectory.conditioning[0][0].float()
        theirs.append([p for _, p in dpl.every_map(sides.network, sides.plain(trajectory)[at], t, text)])
    return furthest(found, theirs[0]), -greatest(-relative(a, b) for a, b in zip(*theirs, strict=True))


# ---- inversions --------------------------------------------------------------------------------------------------

DDIM = "DDIM inversion", "Song et al. 2021, equation 12 turned round; null-text's code"
NULL = "Null-text inversion", "Mokady et al. 2023, algorithm 1"
DIRECT = "Direct inversion", "Ju et al. 2024"
NEGATIVE = "Negative-prompt inversion", "Miyake et al. 2023"
# The hard rule drops a value or not, which rounding may decide for one near the threshold. Of an even number of values,
# this quantile lies in the middle between two; a single value that falls the other way is still within HARDLY.
MIDDLE, HARDLY = 0.5, 2e-3
PROXIMAL = "Proximal guidance", "Han et al. 2024, proximal operators of the l1 and l0 norm"
EMBCTRL = "EmbCtrl", "MaSaFusion, appendix B, equation 12 and algorithm 4"


def inversions(sides):
    bench = sides.bench

    def way(grid, level, number):
        text = bench.text(sides.caption(number))
        latent = bench.encode(sides.pictures[number : number + 1])
        trajectory = call(invert.AttuneDDIMInversion, bench.model, latent, text, bench.steps, grid, level)[0]
        ours = sides.plain(trajectory)
        # The papers take the picture to be z_0 itself, on the grid that ends above 0 as well.
        picture = host.to_model_scale(bench.model, latent["samples"]).float()
        arguments = sides.network, GRIDS[grid], picture, text[0][0].float(), bench.steps
        theirs, other = (reference.ddim_invert(*arguments, LEVELS[one])[1] for one in (level, others[level]))
        return furthest(ours, theirs), relative(other[0], theirs[0])

    first, second = LEVELS
    others = {first: second, second: first}

    def null_losses(grid, stop, number):
        """With ``stop`` half of the updates' losses end a step."""
        _, theirs, _ = sides.plain_nulls(number, grid)
        tolerance = -1.0
        if stop:
            tolerance = float(torch.tensor(theirs).median())
            _, theirs, _ = sides.plain_nulls(number, grid, tolerance)
        trajectory = sides.invert(number, sides.caption(number), grid, False)
        settings = null_text.NullText(bench.guidance, INNER, tolerance=tolerance)
        ours = inversion.learn_losses(bench, trajectory, trajectory.conditioning, sides.empty, settings)
        if list(map(len, ours)) != list(map(len, theirs)):
            return math.inf, 0.0  # one of them stopped at another update
        pairs = [(a, b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
        spared = 1 - len(pairs) / (INNER * len(theirs))
        effect = spared if stop else max(1 - other[-1] / other[0] for other in theirs)
        return greatest(abs(a - b) / b for a, b in pairs), effect

    def embeddings(grid, number):
        ours, (theirs, _, _) = sides.learn_nulls(number, grid).nulls, sides.plain_nulls(number, grid)
        null = sides.empty[0][0].float()
        theirs = torch.stack(theirs)
        return furthest(ours - null, theirs - null), relative(ours, null.expand_as(ours))

    def unscaled(number):
        grid = host.HOST_GRID
        trajectory = sides.invert(number, sides.caption(number), grid, False)
        ours, null = sides.learn_nulls(number, grid).nulls, sides.empty[0][0].float()
        texts = trajectory.conditioning[0][0].float(), null
        given = sides.network, GRIDS[grid], sides.whole(trajectory), *texts, bench.guidance, INNER
        with torch.enable_grad():
            as_written = reference.null_text(*given, early_stop=False, scaled=False)[0]
        pairs = sides.plain_nulls(number, grid)[0], as_written[: len(ours)]
        return tuple(relative(ours - null, torch.stack(nulls) - null) for nulls in pairs)

    def end(grid, number):
        learned = sides.learn_nulls(number, grid)
        last = host.draw_again(bench.model, learned, negative_of(learned), bench.guidance)[-1]
        theirs, free = sides.plain_nulls(number, grid)[2], sides.plain_nulls(number, grid, inner=0)[2]
        return relative(last / (1 + learned.sigmas[-1] ** 2).sqrt(), theirs), relative(free, theirs)

    def direct(every, scale, number):
        trajectory = sides.invert(number, sides.caption(number), host.HOST_GRID, False)
        settings = every, scale, bench.guidance, bench.model, sides.empty
        ours = sides.plain(call(invert.AttuneDirectInversion, trajectory, *settings)[0])
        texts = trajectory.conditioning[0][0].float(), sides.empty[0][0].float()
        arguments = sides.network, GRIDS[host.HOST_GRID], sides.whole(trajectory), *texts, bench.guidance
        theirs = reference.direct(*arguments, every, scale)
        return furthest(ours, theirs), relative(reference.direct(*arguments, bench.steps, 0.0)[-1], theirs[-1])

    def negative(number):
        trajectory = sides.invert(number, sides.caption(number), host.HOST_GRID, False)
        learned, away = call(invert.AttuneNegativePromptInversion, trajectory)
        ours = host.draw_again(bench.model, learned, away, bench.guidance)[-1]
        cond, null = trajectory.conditioning[0][0].float(), sides.empty[0][0].float()
        arguments = sides.network, GRIDS[host.HOST_GRID], sides.whole(trajectory), cond
        theirs, free = (reference.null_text(*arguments, e, bench.guidance, inner=0)[2] for e in (cond, null))
        return relative(ours, theirs), relative(free, theirs)

    def negative_edit(number):
        case = replace(self_parity.cases(sides.scenes[number])["FPE"], source=sides.caption(number))
        trajectory = sides.invert(number, case.source, case.grid, False)
        learned, away = call(invert.AttuneNegativePromptInversion, trajectory)
        given = {"source_prompt": case.source, "target_prompt": case.target} | case.settings
        node = self_attention.AttuneFreePromptEditing
        model, positive = call(node, bench.model, bench.clip, learned, **given)
        nulls = sides.prompt(case.source).embedding[None], None
        theirs, free = (sides.theirs(case, replace(trajectory, nulls=one))[1] for one in nulls)
        return relative(sides.drawn(model, positive, away, learned), theirs), relative(free, theirs)

    def between(share, number):
        """Its own arithmetic: the arc between two directions, in double precision, for each picture one."""
        caption, empty = bench.text(sides.caption(number)), bench.text("")
        trajectory = replace(sides.invert(number, sides.caption(number), host.HOST_GRID, False), conditioning=caption)
        ours = call(invert.AttuneNegativePromptInversion, trajectory, share, empty)[1][0][0]
        a, b = (one[0][0].double().flatten() for one in (caption, empty))
        angle = torch.arccos(a @ b / (a.norm() * b.norm()))
        theirs = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
        return relative(ours.flatten(), theirs.float()), relative(a.float(), theirs.float())

    found = [
        Check(*DDIM, f"latents of every step: {grid}, epsilon at the {level}", functools.partial(way, grid, level))
        for grid in GRIDS
        for level in LEVELS
    ]
    for grid in GRIDS:
        compared = {
            "loss of every update": (functools.partial(null_losses, grid, False), LOSS),
            "loss of every update, stopping early": (functools.partial(null_losses, grid, True), LOSS),
            "what every step's embedding learned": (functools.partial(embeddings, grid), LEARNED),
            "last latents of the guided run": (functools.partial(end, grid), SAME),
        }
        found += [Check(*NULL, f"{what}: {grid}", *how) for what, how in compared.items()]
    return [
        *found,
        Check(
            *NULL, "updates over another number of steps than 50", unscaled, LEARNED,
            departs="the authors' code takes 0.01 (1 - i / 100) at step i of its 50 steps, which is below 0 from "
            "step 101 on; here i is the same share of 50, and of 50 steps both are the same",
        ),
        Check(
            *DDIM, "epsilon at the later level", functools.partial(way, host.HOST_GRID, first), printed=True,
            departs="as printed each latent is asked at its own level; the authors' codes ask at the next one, which "
            "is the default here (epsilon)",
        ),
        Check(*DIRECT, "source branch, every step", functools.partial(direct, 1, 1.0), 0.0),
        Check(*DIRECT, "ablation: every third step, half of the way", functools.partial(direct, 3, 0.5)),
        Check(*NEGATIVE, "last latents of the guided run", negative),
        Check(*NEGATIVE, "last latents of an edit (FPE)", negative_edit),
        Check("Negative-prompt inversion, interpolated", "Han et al. 2024, authors' code", "the negative's embedding",
              functools.partial(between, 0.3)),
    ]


def proximal_guidance(sides):
    """Plain sampling after negative-prompt inversion."""
    bench = sides.bench

    def drawn(quantile, rule, number):
        """The pack's last latents, and how to draw the plain implementation's."""
        after = self_parity.cases(sides.scenes[number])["FPE"].target
        trajectory = sides.invert(number, sides.caption(number), host.HOST_GRID, False)
        learned, away = call(invert.AttuneNegativePromptInversion, trajectory)
        model, positive = call(guidance.AttuneProximalGuidance, bench.model, quantile, rule)[0], bench.text(after)
        texts = positive[0][0].float(), away[0][0].float()
        given = sides.network, GRIDS[host.HOST_GRID], sides.plain(learned)[0], *texts, bench.guidance, bench.steps
        return sides.drawn(model, positive, away, learned), functools.partial(reference.proximal, *given)

    def measure(quantile, rule, number):
        ours, draw = drawn(quantile, rule, number)
        theirs, free = (draw(share, rule == proximal.SOFT)[-1] for share in (quantile, 0.0))
        return relative(ours, theirs), relative(free, theirs)

    def departure(quantile, rule, quirk, number):
        ours, draw = drawn(quantile, rule, number)
        page, code = (draw(quantile, rule == proximal.SOFT, **more)[-1] for more in ({}, quirk))
        return relative(ours, page), relative(ours, code)

    return [
        *(
            Check(*PROXIMAL, f"last latents: {rule}, quantile {quantile:g}", functools.partial(measure, quantile, rule),
                  SAME if rule == proximal.SOFT else HARDLY)
            for rule, quantile in ((proximal.SOFT, 0.4), (proximal.SOFT, 0.7), (proximal.HARD, MIDDLE))
        ),
        Check(
            *PROXIMAL, "whose differences the quantile is of",
            functools.partial(departure, 0.7, proximal.SOFT, {"together": True}),
            departs="the authors' code takes it over source and target together; the source's differences are all 0 "
            "there, so that a share of 0.75 is 0.5 of the target's",
        ),
        Check(
            *PROXIMAL, "what is left under the l0 norm",
            functools.partial(departure, MIDDLE, proximal.HARD, {"shrink": True}), HARDLY,
            departs="its proximal operator leaves large values as they are; the authors' code brings them nearer to 0 "
            "by the threshold, as the l1 norm's does",
        ),
    ]  # fmt: skip


def embedding_control(sides):
    by = sides.prompts

    def both(learned, number):
        case = editing_parity.cases(sides.scenes[number])["swap"]
        trajectory = sides.invert(number, case.source, case.grid, learned)
        source, target = by.prompt(case.source), by.prompt(case.target)
        pairs = zip(source.text.split(" "), target.text.split(" "), target.words, strict=True)
        columns = [column for before, after, at in pairs if before != after for column in at]
        mixed = masa.control(source.embedding, target.embedding, columns)
        return case, trajectory, mixed, target.embedding

    def text(number):
        case, trajectory, mixed, target = both(False, number)
        ours = call(edit.AttuneEmbeddingControl, sides.bench.clip, trajectory, case.source, case.target)[0]
        return relative(ours[0][0], mixed), relative(target, mixed)

    def drawing(learned, number):
        case, trajectory, mixed, target = both(learned, number)
        positive, away = call(edit.AttuneEmbeddingControl, sides.bench.clip, trajectory, case.source, case.target)
        ours = sides.drawn(sides.bench.model, positive, away, trajectory)
        nulls = sides.empty[0][0][None] if trajectory.nulls is None else trajectory.nulls
        path, texts = sides.plain(trajectory), (mixed, target)
        settings = nulls, sides.bench.guidance, sides.bench.steps, self_parity.paper.Nothing()
        # Source and target rows are drawn alike, so one pass gives both the controlled text's and the whole target's.
        last = self_parity.paper.draw(sides.network, GRIDS[case.grid], path[0], *texts, *settings)[len(path) - 1]
        theirs, plain = last.split(1)
        return relative(ours, theirs), relative(plain, theirs)

    return [
        Check(*EMBCTRL, "the text's embedding", text, 1e-6),
        Check(*EMBCTRL, "last latents, null-text embeddings", functools.partial(drawing, True)),
        Check(*EMBCTRL, "last latents, empty text", functools.partial(drawing, False)),
    ]


# ---- words -------------------------------------------------------------------------------------------------------

DPL = "Dynamic Prompt Learning"
PAPER = "Wang et al. 2023, "
PRINTED_LOSSES = (
    ("L_at", "equation 8", "the page takes the greatest value of the smoothed map itself; the authors' code, as here, "
     "first has the maps, times 100, compete in a softmax of the 75 tokens"),
    ("L_dj", "equation 6", "the page sums over all pairs in both orders; the authors' code, as here, takes the mean, "
     "so that thresholds mean the same for any number of words"),
    ("L_bg", "equation 7", "the page sums over the words; the authors' code, as here, takes the mean"),
)  # fmt: skip


def learned_words(sides):
    def losses(which, number):
        ours, (_, _, theirs, null), *_ = sides.learn_words(number)
        every = zip(*(look for step in theirs for look in step), strict=True)
        parts = dict(zip(dynamic_prompt.LOSSES, every, strict=True))
        mine = [look for step in ours.losses for look in step[0]]
        looks = [look for look in mine if "null-text" not in look]
        if which == "null-text":
            mine, flat = [look[which] for look in mine if which in look], [one for step in null for one in step]
            effect = max(1 - step[-1] / step[0] for step in null)
        else:
            mine, flat = [look[which] for look in looks], parts[which]
            effect = max(flat) - min(flat)
        if len(mine) != len(flat):
            return math.inf, 0.0  # one of them stopped at another update
        return greatest(abs(a - b) for a, b in zip(mine, flat, strict=True)), effect

    def vectors(number):
        ours, (theirs, *_), start, _ = sides.learn_words(number)
        mine = [next(iter(step.values()))[0] for step in ours.vectors]
        return relative(torch.stack(mine) - start, torch.stack(theirs) - start), relative(theirs[-1], start)

    def nulls(number):
        ours, (_, theirs, *_), _, null = sides.learn_words(number)
        return furthest([a - null for a in ours.nulls], [b - null for b in theirs]), relative(theirs[-1], null)

    def cross(number):
        ours, _, theirs, _ = sides.look(number)
        return relative(ours, theirs), relative(theirs.mean(0, keepdim=True).expand_as(theirs), theirs)

    def own(number):
        _, ours, _, theirs = sides.look(number)
        return relative(ours, theirs), relative(theirs.mean(0, keepdim=True).expand_as(theirs), theirs)

    def clusters(number):
        points = sides.look(number)[3]
        ours, theirs = words.self_maps.clusters(points, 5), dpl.cut(points, 5, 50)
        least, none = dpl.spread(points, theirs, 5), dpl.spread(points, torch.zeros(len(points)), 1)
        return max(0.0, dpl.spread(points, ours, 5) / least - 1), none / least - 1

    def background(number):
        trajectory = sides.invert(number, sides.caption(number), host.HOST_GRID, False)
        prompt, nouns = sides.nouns(number)
        braced = " ".join(f"{{{word}}}" if word in scenes.SHAPES else word for word in prompt.text.split(" "))
        node = braced, 0.2, 5, dpl.SELF, dpl.CROSS, 1, 0
        ours = call(tokens.AttuneBackgroundMask, sides.bench.model, sides.bench.clip, trajectory, *node)[0][0]
        _, matrix, seen, _ = sides.look(number)
        # Where k-means ends is chance, so both sides are told the same clusters.
        theirs = dpl.background(seen, words.self_maps.clusters(matrix, 5), nouns).view(16, 16)
        share = float(theirs.float().mean())
        return differ(ours[:: host.PIXELS, :: host.PIXELS] > 0.5, theirs), min(share, 1 - share)

    def formula(which, number):
        seen, (_, nouns) = sides.look(number)[2], sides.nouns(number)
        outside = sides.outside(number)
        at, grid = [tuple(columns) for columns in nouns], (16, 16)
        given = dynamic_prompt.DynamicPrompt(), seen, at, outside.expand(len(at), -1), grid
        ours = dynamic_prompt.losses(*given)[dynamic_prompt.LOSSES[which]]
        theirs, printed = (how(seen, nouns, outside)[which] for how in (dpl.losses, dpl.printed_losses))
        return abs(float(ours - theirs)), abs(float(printed - theirs))

    def descent(number):
        ours, (theirs, *_), start, null = sides.learn_words(number)
        mine = torch.stack([next(iter(step.values()))[0] for step in ours.vectors])
        printed = sides.plain_words(number, descent=True)[0]
        theirs, printed = torch.stack(theirs), torch.stack(printed)
        return relative(mine - start, theirs - start), relative(printed - start, theirs - start)

    def reading(number):
        ours, _, theirs, _ = sides.look(number)
        trajectory = sides.invert(number, sides.caption(number), host.HOST_GRID, False)
        text = trajectory.conditioning[0][0].float()
        given = sides.network, GRIDS[host.HOST_GRID], sides.whole(trajectory), text
        inverting = dpl.statistics(*given, inverting=True)[0]
        return relative(ours, theirs), relative(ours, inverting)

    names = {
        dynamic_prompt.BALANCE: "L_at of every look", dynamic_prompt.DISJOINT: "L_dj of every look",
        dynamic_prompt.BACKGROUND: "L_bg of every look", "null-text": "null-text loss of every update",
    }  # fmt: skip
    equations = dict(zip(names, ("equation 8", "equation 6", "equation 7", "equation 4"), strict=True))
    return [
        Check(DPL, PAPER + "section 3.3", "mean cross-attention at 16x16", cross),
        Check(DPL, PAPER + "section 3.3", "mean self-attention", own),
        Check(DPL, PAPER + "section 3.3", "clusters: squared distances, over the best of 50 k-means", clusters, 0.02),
        Check(DPL, PAPER + "section 3.3", "background mask, of the same clusters", background, 0.0),
        *(
            Check(DPL, PAPER + equations[key], name, functools.partial(losses, key), LOSS)
            for key, name in names.items()
        ),
        Check(DPL, PAPER + "equation 9, algorithm 1", "what every step's vectors learned", vectors, LEARNED),
        Check(DPL, PAPER + "algorithm 1", "what every step's null embedding learned", nulls, LEARNED),
        *(
            Check(DPL, PAPER + equation, f"{name} of a picture's maps", functools.partial(formula, which), 1e-5,
                  departs=why, printed=True)
            for which, (name, equation, why) in enumerate(PRINTED_LOSSES)
        ),
        Check(
            DPL, PAPER + "algorithm 1, line 13", "the update of the words", descent, LEARNED, printed=True,
            departs="the page subtracts the gradient itself; the default is AdamW at the authors' code's rate, and the "
            "page's is the optimizer gradient descent at a learning_rate of 1",
        ),
        Check(
            DPL, PAPER + "equation 2, section 3.3", "cross-attention that the background is found by", reading,
            departs="the authors' code reads the passes of its inversion, which ask each latent at the next level's "
            "time; equation 2 asks each at its own, as here, and the code's is the choice statistics",
        ),
    ]  # fmt: skip


# ---- MaSaFusion --------------------------------------------------------------------------------------------------

FUSION = "MaSaFusion"
ETA = 2e-4  # appendix A
EQUATIONS = {
    INTERMEDIATE: "section 4.2, equation 9", TARGET: "section 4.3, equation 10, algorithm 1",
    IN_MASK: "appendix C, equation 14, algorithm 5", EVERYWHERE: "appendix C, equation 13",
}  # fmt: skip
READINGS = {
    masa.SOURCES: "",
    masa.OWN: "own queries outside, ",
}


def masked_fusion(sides):
    def latents(learned, queries, name, number):
        ours, _, theirs, _, plain = sides.fuse(name, number, learned, queries)
        return furthest(ours, theirs), relative(plain[len(ours) - 1], theirs[len(ours) - 1])

    def mixed(learned, queries, name, number):
        _, ours, _, theirs, _ = sides.fuse(name, number, learned, queries)
        return furthest(ours, theirs), min(relative(a, b) for a, b in zip(theirs[:-1], theirs[1:], strict=True))

    def features(number):
        sketch = sides.tasks[number].sketch
        net = masa.adapter(comfy.utils.load_torch_file(str(demo_model.ADAPTER)), demo_model.ADAPTER_CHANNELS)
        ours = demo_model.build_adapter()
        ours.load_state_dict({k: v.float() for k, v in comfy.utils.load_torch_file(str(demo_model.ADAPTER)).items()})
        mine = [one for one in ours(sketch[None, ..., 0])["input"][::-1] if one is not None]
        theirs, other = net(sketch[None, ..., 0]), net(1 - sketch[None, ..., 0])
        return furthest(mine, theirs), min(relative(a, b) for a, b in zip(other, theirs, strict=True))

    found = [Check("T2I-Adapter", "Mou et al. 2023", "features of every level", features)]
    for learned in (False, True):
        inverted = "null-text" if learned else "direct"
        for queries, reading in READINGS.items():
            for name, equation in EQUATIONS.items():
                if name == EVERYWHERE and reading:
                    continue  # equation 13 has no outside
                for what, measure in (("latents", latents), ("mixed prediction", mixed)):
                    compared = f"{name}, {reading}{what} of every step, {inverted}"
                    found.append(Check(FUSION, equation, compared, functools.partial(measure, learned, queries, name)))
    return found + fusion_departures(sides)


def fusion_departures(sides):
    """Where the page says something else than the pack does unless told, or nothing. Each is the pack beside the
    reference told the same, and that beside the reference as the page has it."""
    network = sides.network

    def queries(number):
        ours, _, theirs, *_ = sides.fuse(TARGET, number, False, masa.OWN)
        printed = sides.fuse(TARGET, number, False, masa.SOURCES)[2]
        return relative(ours[-1], theirs[len(ours) - 1]), relative(theirs[len(ours) - 1], printed[len(ours) - 1])

    def beside(number, changed=None, source=None, **settings):
        """The target of algorithm 1 with the reference's edit, source or settings changed."""
        ours, _, theirs, *_ = sides.fuse(TARGET, number, False, masa.SOURCES)
        _, plain, edit = sides.task(number, False)
        told = replace(sides.told(), **settings)
        edit, source = changed(edit) if changed else edit, source or plain
        x = sides.plain(sides.intermediate(number, False, masa.SOURCES)[0])[0]
        t2i, _ = masa.intermediate(network, told, edit, source, x)
        other, _ = masa.target(network, told, edit, source, t2i)
        last = len(ours) - 1
        return relative(ours[last], theirs[last]), relative(theirs[last], other[last])

    def everywhere(number):
        return beside(number, first=0, layer=0)

    def region(number):
        mask = sides.tasks[number].mask[0]
        whole = torch.nn.functional.interpolate(mask[None, None], (16, 16), mode="area")[0, 0] >= 0.5
        return beside(number, lambda edit: replace(edit, region=whole))

    def halves(number):
        return beside(number, lambda edit: replace(edit, residuals=(None, edit.residuals[1])))

    def pinned(number):
        ours, _, theirs, *_ = sides.fuse(IN_MASK, number, True, masa.SOURCES)
        _, source, edit = sides.task(number, True)
        free = masa.walked(network, reference.scheduler(GRIDS[host.HOST_GRID], sides.bench.steps), source,
                           sides.bench.guidance)  # fmt: skip
        edit = replace(edit, residuals=(None, None))
        other, _ = masa.without_intermediate(network, sides.told(), edit, free)
        last = len(ours) - 1
        return relative(ours[last], theirs[last]), relative(theirs[last], other[last])

    def nulls(number):
        """What the nulls learned."""
        grid, stop = host.HOST_GRID, 1e-5
        trajectory, empty = sides.invert(number, sides.caption(number), grid, False), sides.empty[0][0].float()
        settings = sides.empty, sides.bench.guidance, INNER, 0.01, stop, True
        ours = call(invert.AttuneNullTextInversion, trajectory, sides.bench.model, *settings)[0]
        theirs, *_ = sides.plain_nulls(number, grid, stop)
        source = masa.Run(sides.whole(trajectory), trajectory.conditioning[0][0].float(), [empty])
        ddim = reference.scheduler(GRIDS[grid], sides.bench.steps)
        found = masa.printed_nulls(network, ddim, source, sides.bench.guidance, INNER, ETA)
        printed, theirs = torch.stack(found[: len(theirs)]), torch.stack(theirs)
        return relative(ours.nulls - empty, theirs - empty), relative(printed - empty, theirs - empty)

    def turns(number):
        """The picture that the next turn begins at."""
        bench, task = sides.bench, sides.tasks[number]
        trajectory, _, edit = sides.task(number, False)
        made = sides.intermediate(number, False, masa.SOURCES)[0]
        told = trajectory, made, task.mask, FIRST, 1.0, LAYER
        fused, positive, negative, noise, sigmas = call(fusion.AttuneMaskedFusion, bench.model, *told)
        how = False, 0, bench.guidance, positive, negative, sides.euler, sigmas, noise
        edited = call(invert.AttuneRecordTrajectory, fused, *how)[0]
        picture = torch.from_numpy(scenes.render(task.source)[0])[None]
        ours = call(fusion.AttuneNextTurn, trajectory, edited, task.mask, picture, bench.vae, 4)[0]
        theirs = torch.where(edit.region, edited.latents[-1], trajectory.latents[-1])
        drawn = bench.vae.decode(host.host_latent(edited, -1)).clamp(0, 1)
        again = host.to_model_scale(bench.model, bench.encode(drawn)["samples"])
        return relative(ours.latents[-1], theirs), relative(theirs, again)

    rows = {
        "the target, own queries outside": (queries, "section 4.2, equation 9", (
            "the page prints the source's queries outside the mask, which is the default; `queries` own is the reading "
            "as MasaCtrl, that appendix C has for the inside"
        )),
        "the target, layers and steps": (everywhere, "sections 4.2 and 4.3", (
            "the page substitutes self-attentions \"for corresponded layers\" and names neither layers nor steps; here "
            "MasaCtrl's, layer 10 on and 0.08 of the steps on, are the defaults, and 0 and 0 give all"
        )),
        "the target, the region's edge": (region, "section 4.2", (
            "the page has a pixel i in A or not and does not say how a mask becomes latent pixels; here one that the "
            "mask touches is inside, so that thin masks do not vanish; beside it those that are half covered"
        )),
        "the target, the adapter's halves": (halves, "section 4.2, equation 3", (
            "equation 9 gives the adapter's condition to the guided noise and does not say whether the empty text's "
            "half has it; here both have, as in T2I-Adapter's code, and `halves` leaves it to the positive"
        )),
        "without intermediate, null-text, the source row": (pinned, "appendix C, algorithm 5, line 3", (
            "the page caches what DDIM under the learned nulls passes, which drifts off the picture; here the source "
            "is pinned to its trajectory, as algorithm 3 has it and as every edit of the pack"
        )),
        "the next turn's source": (turns, "section 5.1", (
            "the page makes the edited picture the next source, decoded and encoded again; here Attune Next Turn keeps "
            "its latents inside the mask and the source's outside, so that nothing there drifts"
        )),
        "null embeddings": (nulls, "appendix A, algorithm 2", (
            "the page takes plain gradient steps of 2e-4 on a norm; here Adam at 0.01, falling, on its square, as the "
            "code of the paper that it adopts"
        )),
    }  # fmt: skip
    return [
        Check(FUSION, paper, compared, measure, LEARNED if measure is nulls else SAME, departs=why, printed=True)
        for compared, (measure, paper, why) in rows.items()
    ]


# ---- CPAM --------------------------------------------------------------------------------------------------------

CPAM = "CPAM"
GROW = 6  # pixels that a loose mask reaches around the object
AFTER = 0.2  # share of the steps after which a mask is found anew


@dataclass(frozen=True)
class Preserving:
    """One edit, as both sides are told it; masks by name, see :func:`preserving_masks`."""

    part: str
    source: str = "object"
    target: str = "loose"
    prompt: bool = True
    keep: bool = False
    plain: float = 0.1
    printed: bool = False  # the object's keys are the target mask's, as equation 2 prints it
    refined: bool = False
    preserve: bool = True
    extract: bool = True


PRESERVING = {
    "replacement": Preserving("sections 3.3 and 3.4, equations 1, 3 and 4", "loose"),
    "preservation adaptation alone": Preserving("section 3.3, equations 1 to 3", keep=True, prompt=False),
    "localized extraction alone": Preserving("section 3.4, equation 4", plain=1.0),
    "object preserved": Preserving("section 3.3, equation 2", keep=True),
    "object preserved, keys by the target mask": Preserving("section 3.3, equation 2 as printed", keep=True,
                                                            printed=True),
    "no plain layers": Preserving("section 3.3", plain=0.0),
    "removal": Preserving("section 3.5 and appendix A.1", target="empty"),
    "background": Preserving("section 3.5 and appendix A.1", source="around", target="around"),
    "mask refinement": Preserving("section 3.5, mask refinement", source="loose", refined=True),
    "without localized extraction": Preserving("figure 4", keep=True, extract=False),
    "without preservation adaptation": Preserving("figure 4", keep=True, preserve=False),
    "mask refinement without localized extraction": Preserving(
        "section 3.5 and figure 4", source="loose", refined=True, extract=False
    ),
}  # fmt: skip


def preserving_masks(mask):
    """Name -> mask (1, H, W), of an object's (1, H, W) in 0..1."""
    loose = torch.nn.functional.max_pool2d(mask, 2 * GROW + 1, 1, GROW)
    return {"object": mask, "loose": loose, "empty": torch.zeros_like(mask), "around": 1 - mask}


def preserving(sides):
    bench = sides.bench

    @functools.cache
    def both(name, number):
        """The last latents of the pack, the reference and plain drawing; the masks that each found."""
        given = PRESERVING[name]
        shape = next(s for s in scenes.SHAPES if s not in {t.shape for t in sides.scenes[number].things})
        caption = scenes.caption(scenes.edit_thing(sides.scenes[number], 0, shape=shape)) if given.prompt else ""
        trajectory = sides.invert(number, "", host.HOST_GRID, False)
        listed = preserving_masks(sides.masks[number][:1])
        source, target = listed[given.source], listed[given.target]
        refinement = None
        if given.refined:
            node = shape, AFTER, mask_nodes.STANDARDISATIONS[1], 1.0, 1, cpam.NEAREST_TO
            refinement = call(mask_nodes.AttuneMaskRefinement, *node)[0]
        keys = self_attention.BY_TARGET if given.printed else self_attention.BY_SOURCE
        model, positive = call(
            self_attention.AttuneContextPreserving, bench.model, bench.clip, trajectory, caption, source, given.keep,
            given.plain, number, self_attention.EVERY, FIRST, 9, keys, target, refinement, given.preserve,
            given.extract,
        )  # fmt: skip
        drawn = sides.sample(model, positive, sides.empty, trajectory)
        found = refinement and refinement.log.masks(drawn["samples"])
        # The tenth of the layers is drawn at random: the same draw on both sides.
        chance = {
            (step, layer)
            for step in range(bench.steps)
            for layer in range(16)
            if random.Random(f"{number} {step} {layer}").random() < given.plain
        }
        prompt = sides.prompt(caption)
        settings = cpam.Settings(
            source[0], target[0], (target if given.printed else source)[0], given.keep, int(FIRST * bench.steps), 9,
            frozenset(chance), tuple(prompt.columns(shape)) if given.refined else (), int(AFTER * bench.steps),
            preserve=given.preserve, extract=given.extract,
        )  # fmt: skip
        path, null = sides.whole(trajectory), sides.empty[0][0]
        drawing = prompt.embedding, null, bench.guidance, bench.steps

        def theirs(**changes):
            return cpam.draw(sides.network, GRIDS[host.HOST_GRID], path, *drawing, replace(settings, **changes))

        ours, (latents, masks) = host.to_model_scale(bench.model, drawn["samples"]), theirs()
        return ours, latents[-1], plain(caption, number), found, masks, theirs, target[0]

    @functools.cache
    def plain(caption, number):
        noise = sides.plain(sides.invert(number, "", host.HOST_GRID, False))[0]
        texts = [sides.prompt(text).embedding for text in ("", caption)]
        settings = sides.empty[0][0][None], bench.guidance, bench.steps, self_parity.paper.Nothing()
        return self_parity.paper.draw(sides.network, GRIDS[host.HOST_GRID], noise, *texts, *settings)[-1][1:]

    def latents(name, number):
        ours, theirs, without, *_ = both(name, number)
        return relative(ours, theirs), relative(without, theirs)

    def choice(changed, number):
        """Beside the paper's own, of which ``changed`` gives the settings by the target mask."""
        ours, theirs, _, _, _, draw, target = both("object preserved", number)
        return relative(ours, theirs), relative(draw(**changed(target))[0][-1], theirs)

    def found_masks(number):
        _, _, _, ours, theirs, *_ = both("mask refinement", number)
        theirs = torch.stack(theirs[max(1, int(AFTER * bench.steps)) :])
        if len(ours.masks) != len(theirs):
            return math.inf, 0.0  # one of them began in another step
        return differ(ours.masks[:, 0], theirs), min(float(theirs.mean()), 1 - float(theirs.mean()))

    return [
        *(
            Check(CPAM, given.part, f"last latents: {name}", functools.partial(latents, name))
            for name, given in PRESERVING.items()
        ),
        Check(CPAM, "section 3.5, mask refinement", "the masks of every step", found_masks, 0.0),
        Check(
            CPAM, "section 3.3, equation 2", "the object's keys",
            functools.partial(choice, lambda target: {"object_": target}),
            printed=True,
            departs="printed are the target mask's, which are the object's only where it stays; here they are the "
            "source mask's (source_keys offers both)",
        ),
        Check(
            CPAM, "section 3.3, equation 2", f"when the object is read from on, of {bench.steps} steps",
            functools.partial(choice, lambda _: {"first": 4}),
            printed=True,
            departs="printed is step 3, of how many is not said; here it is the share of the steps that step 3 is of "
            "50 (object_start)",
        ),
    ]  # fmt: skip


# ---- region prompts ----------------------------------------------------------------------------------------------


def regions(sides):
    """A prompt for each object and one for the rest, from the noise of the inverted picture."""
    bench = sides.bench

    def masks(kind, number):
        """Two regions (H, W) in 0..1."""
        if kind == "two regions and the rest":
            return list((sides.masks[number][:2] > 0.5).float())
        size = sides.masks[number].shape[-2:]
        ramp = torch.linspace(-0.2, 1.2, size[1]).clamp(0, 1).expand(size)
        if kind == "soft borders":
            return [ramp, 0.7 * ramp.flip(-1).T]
        return [(ramp > 0.3).float(), (ramp.T > 0.4).float()]  # overlapping

    def latents(kind, number):
        scene = sides.scenes[number]
        things = [f"a {thing.color} {thing.shape}" for thing in scene.things]
        prompts = f"a {scene.background} background", *reversed(things)
        given = masks(kind, number)
        settings = *prompts, "", "", *(mask[None] for mask in given)
        model, positive = call(self_attention.AttuneRegionPrompts, bench.model, bench.clip, *settings)
        trajectory = sides.invert(number, "", host.HOST_GRID, False)
        drawn = sides.sample(model, positive, sides.empty, trajectory)
        ours = host.to_model_scale(bench.model, drawn["samples"])
        texts = [sides.prompt(text).embedding for text in prompts]
        start, null = sides.plain(trajectory)[0], sides.empty[0][0]

        def theirs(where):
            settings = GRIDS[host.HOST_GRID], start, texts, where, null, bench.guidance, bench.steps
            return regional.draw(sides.network, *settings)[len(trajectory.latents) - 1]

        found = theirs(given)
        return relative(ours, found), relative(theirs([torch.zeros_like(mask) for mask in given]), found)

    return [
        Check("Region Prompts", "CPAM, section 3.1", f"last latents: {kind}", functools.partial(latents, kind))
        for kind in ("two regions and the rest", "soft borders", "overlapping regions")
    ]


# ---- formulas ----------------------------------------------------------------------------------------------------


def formulas(sides):
    model, generator = sides.bench.model, torch.Generator().manual_seed(sides.bench.seed)
    steps = sides.bench.steps

    def noise():
        return torch.randn(1, 4, 16, 16, generator=generator)

    def scheduler(kind, grid):
        offset = grid == host.HOST_GRID
        made = kind(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=offset, steps_offset=int(offset),
        )  # fmt: skip
        made.set_timesteps(steps)
        return made

    def levels(grid, _):
        ours = host.schedule(model, steps, grid)
        alphas = {g: scheduler(DDIMScheduler, g).alphas_cumprod[scheduler(DDIMScheduler, g).timesteps] for g in GRIDS}
        theirs = {g: ((1 - a) / a).sqrt() for g, a in alphas.items()}
        (other,) = set(GRIDS) - {grid}
        return relative(ours[:steps], theirs[grid]), relative(theirs[other][:-1], theirs[grid][:-1])

    def step_down(grid, _):
        found, plain, sigmas = [], scheduler(DDIMScheduler, grid), host.schedule(model, steps, grid)
        for t, high, low in zip(plain.timesteps, sigmas[:-1], sigmas[1:], strict=False):
            z, eps = noise(), noise()
            x = z * (1 + high**2).sqrt()
            ours = ddim.step_down(x, x - high * eps, high, low) / (1 + low**2).sqrt()
            theirs = plain.step(eps, t, z).prev_sample
            found.append((relative(ours, theirs), relative(z, theirs)))
        return greatest(a for a, _ in found), greatest(b for _, b in found)

    def step_up(grid, _):
        sigmas, plain = host.schedule(model, steps, grid), scheduler(DDIMInverseScheduler, grid)
        rising = sigmas.flip(0)
        predicted = [noise() for _ in rising[1:]]
        asked = iter(predicted)

        def denoise(x, sigma):
            return x - sigma * next(asked)

        # The inverse scheduler starts at the clean picture, where the papers' grid has no step.
        z = start = noise()
        ours = ddim.invert(denoise, start * (1 + rising[0] ** 2).sqrt(), sigmas, ddim.LATER, 0.0, lambda *_: None)
        pairs = zip(predicted, plain.timesteps[len(plain.timesteps) - len(predicted) :], strict=True)
        for eps, t in pairs:
            z = plain.step(eps, t, z).prev_sample
        return relative(ours[0] / (1 + sigmas[0] ** 2).sqrt(), z), relative(start, z)

    def thresholds(_):
        settings, plain = dynamic_prompt.DynamicPrompt(), dpl.Settings()
        ours = [settings.thresholds(step, 50) for step in range(50)]
        theirs = [dpl.thresholds(step, 50, plain.beta, plain.alpha) for step in range(50)]
        # The paper prints t, which would loosen them where it counts down: the code counts up.
        printed = [dpl.thresholds(49 - step, 50, plain.beta, plain.alpha) for step in range(50)]
        ours, theirs, printed = (torch.tensor(one, dtype=torch.float64) for one in (ours, theirs, printed))
        return relative(ours, theirs), relative(printed, theirs)

    def shares(_):
        hundredths = range(101)
        ours, code = ([first(h / 100, 50) for h in hundredths] for first in (first_step, lambda a, n: int(a * n)))
        right = [h // 2 for h in hundredths]
        ours, code, right = (torch.tensor(one, dtype=torch.float64) for one in (ours, code, right))
        return relative(ours, right), relative(ours, code)

    def three_losses(which, _):
        found, nouns, others = [], [(2,), (5, 6), (9,)], [(1,), (4, 5), (8,)]
        for _ in range(20):
            seen = torch.randn(256, 77, generator=generator).softmax(-1)
            outside = (torch.rand(256, generator=generator) > 0.5).float()
            settings = dynamic_prompt.DynamicPrompt()
            ours = dynamic_prompt.losses(settings, seen, nouns, outside.expand(3, -1), (16, 16))
            theirs, other = (dpl.losses(seen, one, outside)[which] for one in (nouns, others))
            found.append((abs(float(ours[dynamic_prompt.LOSSES[which]] - theirs)), abs(float(theirs - other))))
        return greatest(a for a, _ in found), greatest(b for _, b in found)

    def text_encoder(number):
        prompt = sides.prompt(sides.caption(number))
        encoder = dpl.Encoder(sides.weights["text"], [], HEADS)
        theirs = encoder([encoder.row(token) for token in prompt.ids])
        return relative(prompt.embedding, theirs), relative(sides.empty[0][0], theirs)

    found = []
    for grid in GRIDS:
        found += [
            Check("Noise levels", DDIM[1], f"sigmas: {grid}", functools.partial(levels, grid), once=True),
            Check("DDIM step", "Song et al. 2021, equation 12", f"against diffusers' DDIMScheduler: {grid}",
                  functools.partial(step_down, grid), 1e-5, once=True),
            Check("DDIM inversion step", DDIM[1], f"against diffusers' DDIMInverseScheduler: {grid}",
                  functools.partial(step_up, grid), 1e-5, once=True),
        ]  # fmt: skip
    names = ("L_at", 8), ("L_dj", 6), ("L_bg", 7)
    return [
        *found,
        Check(DPL, PAPER + "equation 10", "thresholds of all 50 steps", thresholds, 1e-6, once=True),
        Check(*PAPERS["swap"], "where windows end, of 50 steps", shares, once=True,
              departs="0.58 of 50 steps is 29; the authors' code takes the whole part of 28.999..., one step less"),
        Check(
            DPL, PAPER + "equation 10", "which way thresholds go", thresholds, 1e-6, once=True, printed=True,
            departs="the printed t counts down while drawing, so thresholds would loosen; the authors' code, as here, "
            "counts up, so that they tighten",
        ),
        *(
            Check(DPL, f"{PAPER}equation {equation}", f"{name} of random maps", functools.partial(three_losses, which),
                  1e-5, once=True)
            for which, (name, equation) in enumerate(names)
        ),
        Check("Text encoder", "Radford et al. 2021", "embedding, against transformers' CLIP", text_encoder),
    ]  # fmt: skip


# ---- the table ---------------------------------------------------------------------------------------------------


def checks(sides):
    """All of them, in the order of the table."""
    return [
        *formulas(sides),
        *inversions(sides),
        *proximal_guidance(sides),
        *around_edits(sides),
        *edits(sides, editing_parity, sides.prompts),
        *edits(sides, self_parity, sides),
        *other_families(),
        *embedding_control(sides),
        *learned_words(sides),
        *masked_fusion(sides),
        *preserving(sides),
        *regions(sides),
        *choices(sides),
    ]


def measured(check, count):
    """The :class:`Row` of a check over the first ``count`` scenes."""
    found = []
    for number in range(1 if check.once else count):
        # Gradients are taken, which what is made in inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            found.append(check.measure(number))
    return Row(check, greatest(apart for apart, _ in found), -greatest(-effect for _, effect in found))


def markdown(rows):
    """The rows as tables: faithful ones, departures, and departures from the page."""
    same, other = ([row for row in rows if bool(row.check.departs) == departs] for departs in (False, True))
    printed, other = ([row for row in other if row.check.printed == on] for on in (True, False))
    parts = []
    if same:
        heads = "method", "in the paper", "compared", "apart", "the method's own effect"
        parts.append(_table(heads, [(row.check.method, row.check.paper, row.check.compared) for row in same], same))
    if other:
        heads = "method", "what", "why", "from the paper", "from the authors' code"
        told = [(row.check.method, row.check.compared, row.check.departs) for row in other]
        parts.append("Where the pack departs on purpose:\n\n" + _table(heads, told, other))
    if printed:
        heads = "method", "in the paper", "what", "why", "apart, told the same", "from the page"
        told = [(row.check.method, row.check.paper, row.check.compared, row.check.departs) for row in printed]
        parts.append("Where the page says something else, or nothing:\n\n" + _table(heads, told, printed))
    return "\n\n".join(parts)


def _table(heads, told, rows):
    """``told`` is what the first cells of each of the ``rows`` say."""
    lines = [f"| {' | '.join((*heads, 'bound', 'holds'))} |", "|---" * (len(heads) + 2) + "|"]
    for said, row in zip(told, rows, strict=True):
        cells = *said, short(row.distance), short(row.effect), f"{row.check.bound:g}", "yes" if row.holds else "NO"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def short(value):
    return f"{value:.2g}"


def page(rows, args):
    """The whole page: what was measured, on what, the tables."""
    versions = host.versions() | {
        name: importlib.metadata.version(name) for name in ("diffusers", "transformers", "scipy")
    }
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    held = sum(row.holds for row in rows)
    return (
        "# Faithfulness\n\n"
        "Written by `python3 dev.py bench faithfulness`. Every method of the pack, drawn by its nodes and the stock "
        "sampler, beside a\nplain implementation written from the paper on diffusers, with the demo model's weights, "
        "from the same noise.\n\n"
        f"{datetime.date.today()}; {said}; fp32 on {host_device()}; {args.count} held-out scenes, {args.steps} steps, "
        f"guidance {args.guidance:g}, seed {args.seed}.\n\n"
        "`apart` is the largest distance over the scenes: of latents, maps and embeddings the root mean square of "
        "their difference\nover that of the plain one's, of losses the difference, for null-text's the relative one, "
        "of masks the share of places\nthat differ. `the method's own effect` is the smallest over the scenes, in the "
        "same measure: how far the result lies from\nthe same run without the method, or, for a formula, from its "
        "neighbour. A row holds where `apart` is within the bound\nand the effect is more than "
        f"{MARGIN} times the bound.\n\n"
        f"{held} of {len(rows)} rows hold.\n\n{markdown(rows)}\n"
    )


def host_device():
    return "the CPU" if comfy.model_management.get_torch_device().type == "cpu" else "a GPU"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=20, help="a divisor of 1000")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="part of a row's method and what is compared; the page is left alone"
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    sides, rows = Sides(Bench(args.count, args.seed, args.steps, args.guidance)), []
    chosen = [check for check in checks(sides) if args.only.lower() in check.name.lower()]
    for number, check in enumerate(chosen, 1):
        begun = time.perf_counter()
        rows.append(row := measured(check, args.count))
        said = f"{row.distance:.2g}, effect {row.effect:.2g}" + ("" if row.holds else ": DOES NOT HOLD")
        log.info("%d of %d: %s: %s, %.1f s", number, len(chosen), check.name, said, time.perf_counter() - begun)
    log.info("\n%s", markdown(rows))
    if not args.only:
        PAGE.write_text(page(rows, args), encoding="utf-8")
    return 0 if rows and all(row.holds for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
