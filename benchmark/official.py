"""The nodes beside the authors' own code, as it lies in your clones of it. Run as ``python3 dev.py bench official``.

    dev.py bench official --code FOLDER      FOLDER holds clones of the repositories, under their own names

Same weights, same noise, same choices on both sides, on the papers' timesteps: what the pack's nodes and the stock
sampler draw, and what the authors' classes draw, which :mod:`official_code` imports as they are. A repository that is
not there is skipped in a sentence. Nothing of theirs is kept.

A row is "the same" up to :data:`SAME`, or a departure that is declared here with its reason; anything else is DIFFERENT
and makes the exit code 1. So does a declared departure that shows no difference. The table is printed, and with
``--keep`` written to benchmark/OFFICIAL.md.
"""

import argparse
import datetime
import functools
import importlib.metadata
import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.utils
import torch
from diffusers.models.attention_processor import Attention

from ..demo import scenes
from ..demo.measure import Bench, call
from ..inversion import host
from ..inversion.report import psnr
from ..inversion.trajectory import negative_of
from ..nodes import invert
from . import editing_parity, official_code, official_tokens, reference, self_parity
from .inversion import relative
from .official_code import LEARNED, SAME, Check

PAGE = Path(__file__).parent / "OFFICIAL.md"
GRID, THEIRS = host.PAPERS_GRID, reference.OFFSET_0
NOTEBOOK = "null_text_w_ptp.ipynb"
INNER = 5  # updates a step of null-text inversion
WORDS_AFTER = "their aligner counts on from the wrong place behind a word of another length (`mapper[j, j]`)"
REMOVED = "their aligner lets the end and the padding look where a removed word looked"
CORNER = "they take the mask's value in a token's corner, here a token takes the greatest value in it"
EMPTY = "they then read all keys alike, a blur; here a query reads its own row"
FREE = "their source row runs freely; here it is pinned to its trajectory, as their `ref_intermediate_latents` does"
SOFT = "to them a key between 0 and 1 lies in both parts, its value a bias; here it is the object's from 0.5 on"
ONCE_MORE = "their last step here is onto itself, but blends once more, by a mask that may have shrunk"
UNBOUNDED = "their word's window bounds its factor, too; here a factor has word_windows of its own"
FIFTY = 50  # steps, for which null-text inversion's rate and early stop are written; with others the pack scales them
log = logging.getLogger("attune.bench")


@dataclass(frozen=True)
class Row:
    """What came out: the largest distance over the scenes, the least PSNR between the pictures and the smallest effect
    of the method (None where there is none to tell)."""

    check: Check
    apart: float
    decibels: float | None = None
    effect: float | None = None

    @property
    def holds(self):
        return (self.apart > self.check.bound) if self.check.departs else (self.apart <= self.check.bound)

    @property
    def verdict(self):
        if not self.holds:
            return "NO LONGER A DEPARTURE" if self.check.departs else "DIFFERENT"
        return f"departs: {self.check.departs}" if self.check.departs else "the same"


class Sides(self_parity.Sides):
    """The pack's side, and the scenes."""

    def __init__(self, bench):
        super().__init__(bench)
        self.prompts = editing_parity.Sides(bench)
        self.scenes = bench.scenes(objects=2)[0]

    def model(self, kind):
        """What their functions are told: the shared UNet, its attention named as they expect."""
        return official_code.model(self.bench, self.network, kind, THEIRS, self.bench.steps)

    def path(self, trajectory):
        """The trajectory in their coordinates and at all of their steps, the last of which is onto itself."""
        path = list((trajectory.latents / (1 + trajectory.sigmas**2).sqrt().view(-1, 1, 1, 1, 1)).unbind())
        return path + [path[-1]] * (self.bench.steps + 1 - len(path))


# ---- google/prompt-to-prompt, or PnPInversion's copy of its classes --------------------------------------------------


class PromptToPrompt:
    """Their controllers and drawing: of their notebook where the clone has it, else of PnPInversion."""

    def __init__(self, sides, clones):
        self.sides, self.steps, self.guidance, self.clones = sides, sides.bench.steps, sides.bench.guidance, clones
        self.model = sides.model(official_code.CrossAttention)
        self.extra = {"tokenizer": self.model.tokenizer, "device": "cpu", "num_ddim_steps": self.steps}
        folder = clones.get("prompt-to-prompt")
        tools = official_code.read(folder, "ptp_utils", "seq_aligner") if folder else None
        if folder and (folder / NOTEBOOK).is_file():
            self.name = f"prompt-to-prompt, {NOTEBOOK}"
            settings = {"tokenizer": self.model.tokenizer, "device": torch.device("cpu"), "LOW_RESOURCE": False,
                        "NUM_DDIM_STEPS": self.steps, "GUIDANCE_SCALE": self.guidance, "MAX_NUM_WORDS": 77,
                        "x_t": torch.zeros(1, 4, 16, 16), "tqdm": Bar}  # fmt: skip
            self.code = official_code.read_notebook(folder / NOTEBOOK, folder, **settings)
            self.inversion = self.code.NullInversion
            self.code.ptp_utils.init_latent = official_code.init_latent
            self.tools = self.code.ptp_utils
        else:
            self.name = "PnPInversion, models/p2p"
            names = ("attention_control", "p2p_guidance_forward", "inversion")
            self.code, self.forward, inversion = official_code.read(
                clones["PnPInversion"], *(f"models.p2p.{name}" for name in names)
            )
            self.forward.init_latent = official_code.init_latent
            self.code.LATENT_SIZE = 16, 16
            self.inversion = inversion.NullInversion
            self.direct = inversion.DirectInversion
            self.tools = self.code
            if tools:  # google's own aligner and windows in place of the copies
                self.name = f"prompt-to-prompt, ptp_utils.py and seq_aligner.py; {self.name}"
                self.code.seq_aligner = tools[1]
                self.code.get_time_words_attention_alpha = tools[0].get_time_words_attention_alpha
                self.code.get_word_inds = tools[0].get_word_inds
        self.run, self.plain = functools.cache(self.run), functools.cache(self.plain)

    def controller(self, case):
        """Their controller for a case; None for a case without an edit."""
        code, prompts = self.code, [case.source, case.target]
        words = dict(case.word_windows) | dict.fromkeys(case.preserve, case.cross)
        cross = {"default_": (0.0, 0.0) if case.preserve else case.cross}
        blend = None
        if case.inside:
            threshold, start, _ = editing_parity.BLEND
            told = (case.source_inside, case.inside), (case.source_outside, case.outside)
            present = [
                [
                    [word for word in words if word in prompt.split(" ")]
                    for words, prompt in zip((ours or theirs, theirs), prompts, strict=True)
                ]
                for ours, theirs in told
            ]
            blend = official_code.fit(
                small_blend(code.LocalBlend), prompts, present[0], substruct_words=present[1] if case.outside else None,
                start_blend=start, th=(threshold, case.outside_threshold or threshold), **self.extra,
            )  # fmt: skip
        given = prompts, self.steps, cross, case.self_
        last = None
        if case.kind != editing_parity.NONE:
            kind = {editing_parity.SWAP: code.AttentionReplace, editing_parity.REFINE: code.AttentionRefine}[case.kind]
            last = official_code.fit(kind, *given, local_blend=blend, **self.extra)
        if case.weights:
            chosen, values = zip(*case.weights, strict=True)
            equalizer = official_code.fit(code.get_equalizer, case.target, chosen, values, **self.extra)
            settings = {"equalizer": equalizer, "local_blend": blend, "controller": last}
            last = official_code.fit(code.AttentionReweight, *given, **settings, **self.extra)
        if last and words:
            # Their copy hands no tokenizer on to where single words are looked up.
            alphas = self.tools.get_time_words_attention_alpha
            last.cross_replace_alpha = alphas(prompts, self.steps, cross | words, self.model.tokenizer)
        return last

    def draw(self, prompts, controller, noise, nulls=None, last=-2):
        """Their latents (2, 4, h, w), source and target, after the last step that the pack takes as well; after the one
        behind it with ``last`` -1."""
        official_code.name_attention(self.model.unet, official_code.CrossAttention)
        settings = {"latent": noise, "num_inference_steps": self.steps, "guidance_scale": self.guidance}
        settings |= {"uncond_embeddings": nulls, "return_type": "latent"}
        draw = getattr(self.code, "text2image_ldm_stable", None) or self.forward.p2p_guidance_forward
        controller = controller or self.code.EmptyControl()
        kept = keep_steps(controller)
        with official_code.quiet():
            official_code.fit(draw, self.model, prompts, controller, **settings)
        return kept[self.steps + last]

    def run(self, case, number):
        trajectory = self.sides.prompts.trajectory(case, number)
        last = self.draw([case.source, case.target], self.controller(case), self.sides.path(trajectory)[0])
        return trajectory, last

    def plain(self, case, number):
        """Their target without an edit."""
        trajectory = self.sides.prompts.trajectory(case, number)
        return self.draw([case.target], None, self.sides.path(trajectory)[0])

    def measure(self, name, number):
        case = cases(self.sides.scenes[number])[name]
        trajectory, theirs = self.run(case, number)
        bare = replace(case, kind="", weights=(), inside=(), outside=(), word_windows=(), preserve=(), cross=(0.0, 0.8))
        plain = self.plain(replace(bare, self_=(0.0, 0.4)), number)
        return self.sides.prompts.ours(case, trajectory), theirs[1:], plain, trajectory

    def to_the_end(self, name, number):
        """With their step at t = 0, which the pack does not take."""
        case = cases(self.sides.scenes[number])[name]
        trajectory = self.sides.prompts.trajectory(case, number)
        prompts, noise = [case.source, case.target], self.sides.path(trajectory)[0]
        theirs = self.draw(prompts, self.controller(case), noise, last=-1)
        return self.sides.prompts.ours(case, trajectory), theirs[1:], None, trajectory

    def checks(self):
        listed = cases(self.sides.scenes[0])
        for name in listed:
            measure = functools.partial(self.measure, name)
            yield Check("Prompt-to-Prompt", name, measure, DEPARTURES.get(name, ""))
        name = "refine, local blend with a word outside"
        measure = functools.partial(self.to_the_end, name)
        yield Check("Prompt-to-Prompt", f"{name}, to their step at t = 0", measure, ONCE_MORE)

    # -- inversions

    def inverted(self, latent, caption):
        """Their inverter, told the prompt, and its trajectory from picture to noise."""
        official_code.name_attention(self.model.unet, official_code.CrossAttention)
        inverter = official_code.fit(self.inversion, self.model, **self.extra)
        inverter.init_prompt(caption)
        with official_code.quiet():
            return inverter, inverter.ddim_loop(latent)

    def ddim(self, number):
        caption = scenes.caption(self.sides.scenes[number])
        trajectory = self.sides.invert(number, caption, GRID, False)
        path, bench = self.sides.path(trajectory), self.sides.bench
        latent = bench.encode(bench.scenes(objects=2)[1][number : number + 1])
        picture = host.to_model_scale(bench.model, latent["samples"]).float()
        theirs = self.inverted(picture, caption)[1][::-1]
        count = len(trajectory.sigmas)
        return torch.stack(path[:count]), torch.stack(theirs[:count]), None, None

    def null_text(self, number):
        caption = scenes.caption(self.sides.scenes[number])
        trajectory = self.sides.invert(number, caption, GRID, False)
        path = self.sides.path(trajectory)
        settings = self.sides.empty, self.guidance, INNER, 0.01, 1e-5, True
        learned = call(invert.AttuneNullTextInversion, trajectory, self.sides.bench.model, *settings)[0]
        ours = host.draw_again(self.sides.bench.model, learned, negative_of(learned), self.guidance)[-1]
        inverter, latents = self.inverted(path[-1].clone(), caption)
        more = {"guidance_scale": self.guidance}
        with torch.enable_grad(), official_code.quiet():
            nulls = official_code.fit(inverter.null_optimization, latents, INNER, 1e-5, **more)
        draw = functools.partial(self.draw, [caption], None, latents[-1])
        theirs, plain = draw(nulls), draw()
        return host_scale(ours, trajectory), theirs, plain, learned

    def inversions(self):
        yield Check("DDIM inversion", "all latents", self.ddim)
        compared = f"guided run under what was learned, {FIFTY} steps"
        yield Check("Null-text inversion", compared, self.null_text_of_fifty, bound=LEARNED)

    def null_text_of_fifty(self, number):
        bench = self.sides.bench
        if bench.steps == FIFTY:
            return self.null_text(number)
        longer = Bench(bench.count, bench.seed, FIFTY, bench.guidance)
        return PromptToPrompt(Sides(longer), self.clones).null_text(number)


def keep_steps(controller):
    """A list that the latents after each of their steps will be in. Their last step on these timesteps is onto itself,
    but blends and pins once more; the pack does not take it."""
    kept, step = [], controller.step_callback

    def keep(latents):
        kept.append(step(latents))
        return kept[-1]

    controller.step_callback = keep
    return kept


def host_scale(latent, trajectory):
    """A latent at a trajectory's last noise level, in their coordinates."""
    return latent / (1 + trajectory.sigmas[-1] ** 2).sqrt()


class Bar:
    """A progress bar that shows nothing."""

    def __init__(self, rest=(), **_):
        self.rest = rest

    def __iter__(self):
        return iter(self.rest)

    def update(self, *_):
        pass

    close = update


def small_blend(kind):
    """Their blend for latents of 16x16: at 512 pixels the maps of 16x16 lie two levels deeper in their store."""

    class Small(kind):
        def __call__(self, latents, store):
            moved = {"down_cross": [None, None, *store["down_cross"][:2]], "up_cross": store["up_cross"][6:9]}
            return super().__call__(latents, moved)

    return Small


DEPARTURES = {
    "swap, more tokens in the new word": WORDS_AFTER,
    "swap, fewer tokens in the new word": WORDS_AFTER,
    "refine, words removed": REMOVED,
    "swap, a word of three for CLIP and one between spaces": WORDS_AFTER,
    "re-weight after swap, the window not the factor's": UNBOUNDED,
}
# They keep all self-attention maps up to 1024 tokens, and cut a prompt at 77.
LEFT_OUT = (
    "swap, prompts over 77 tokens", "swap, the papers' timesteps", "swap, cross-attention in layers 1-6 and 8",
    "swap, self-attention in layers 4-14",
)  # fmt: skip


@functools.cache
def cases(scene):
    """Name -> the cases of :mod:`editing_parity` that their code can be told, on the papers' timesteps."""
    found = editing_parity.cases(scene)
    kept = {name: replace(case, grid=GRID, limit=1024) for name, case in found.items() if name not in LEFT_OUT}
    return {name.replace(" and token limit", ""): case for name, case in kept.items()}


# ---- PnPInversion ----------------------------------------------------------------------------------------------------


class Direct:
    """Direct inversion with Prompt-to-Prompt, and its two ablations."""

    def __init__(self, sides, clones):
        self.sides = sides
        self.code = PromptToPrompt(sides, {"PnPInversion": clones["PnPInversion"]})

    def told(self, number, caption):
        """(their inverter, the pack's trajectory on their timesteps, its last latent) of a picture."""
        trajectory = self.sides.invert(number, caption, GRID, False)
        official_code.name_attention(self.code.model.unet, official_code.CrossAttention)
        inverter = self.code.direct(self.code.model, self.code.steps)
        return inverter, trajectory, self.sides.path(trajectory)[-1]

    def draw(self, prompts, controller, noise, offsets):
        forward = self.code.forward.direct_inversion_p2p_guidance_forward
        settings = {"latent": noise, "num_inference_steps": self.code.steps, "guidance_scale": self.code.guidance}
        kept = keep_steps(controller)
        with official_code.quiet():
            forward(self.code.model, prompts, controller, noise_loss_list=offsets, **settings)
        return kept

    def edit(self, name, number):
        case = cases(self.sides.scenes[number])[name]
        inverter, trajectory, picture = self.told(number, case.source)
        prompts = [case.source, case.target]
        with official_code.quiet():
            *_, latents, offsets = inverter.invert(picture, prompts, self.code.guidance)
        theirs = self.draw(prompts, self.code.controller(case), latents[-1], offsets)[self.code.steps - 2]
        plain = self.code.draw([case.target], None, latents[-1])
        given = call(invert.AttuneDirectInversion, trajectory, 1, 1.0, self.code.guidance)[0]
        return self.sides.prompts.ours(case, given), theirs[1:], plain, trajectory

    def source(self, every, scale, number):
        caption = scenes.caption(self.sides.scenes[number])
        inverter, trajectory, picture = self.told(number, caption)
        prompts = [caption] * 2
        with official_code.quiet():
            if every > 1:
                *_, latents, offsets = inverter.invert_skip_step(picture, prompts, self.code.guidance, every)
            else:
                *_, latents, offsets = inverter.invert_not_full(picture, prompts, self.code.guidance, scale=scale)
        drawn = self.draw(prompts, self.code.code.EmptyControl(), latents[-1], offsets)
        # Without their last step, which is onto itself but pinned once more.
        count = len(trajectory.sigmas)
        theirs, pinned = torch.stack([both[:1] for both in drawn[: count - 1]]), torch.stack(latents[::-1][1:count])
        settings = every, scale, self.code.guidance, self.sides.bench.model, self.sides.empty
        ours = call(invert.AttuneDirectInversion, trajectory, *settings)[0]
        return torch.stack(self.sides.path(ours)[1:count]), theirs, pinned, None

    def checks(self):
        for name in ("swap of two words", "re-weight after swap", "refine, local blend with a word outside"):
            yield Check("Direct inversion with Prompt-to-Prompt", name, functools.partial(self.edit, name))
        for name, settings in (("skip_step 3", (3, 1.0)), ("scale 0.5", (1, 0.5))):
            measure = functools.partial(self.source, *settings)
            yield Check("Direct inversion", f"all latents of the source, {name}", measure)


# ---- MasaCtrl and Free-Prompt-Editing --------------------------------------------------------------------------------


class SelfAttention:
    """What both have in common: a pipeline of theirs, which draws source and target under a controller."""

    def pipeline(self, kind):
        pipe = kind.__new__(kind)
        for name, value in vars(self.sides.model(Attention)).items():
            if name != "device":  # theirs is a property, and not asked for
                object.__setattr__(pipe, name, value)
        pipe.unet.in_channels = 4
        return pipe

    def draw(self, controller, case, trajectory, pinned=True):
        """Their last target latent (1, 4, h, w)."""
        official_code.name_attention(self.pipe.unet, Attention)
        if controller is not None:
            self.register(self.pipe, controller)
        path = self.sides.path(trajectory)
        height, width = (host.PIXELS * size for size in path[0].shape[-2:])
        settings = {"num_inference_steps": self.steps, "guidance_scale": self.sides.bench.guidance, "height": height,
                    "width": width, "ref_intermediate_latents": path[::-1] if pinned else None}  # fmt: skip
        with official_code.quiet():
            self.pipe([case.source, case.target], latents=path[0].expand(2, -1, -1, -1), **settings)
        return self.pipe.vae.last[1:]

    def measure(self, name, number, pinned=True):
        case = replace(self.cases(self.sides.scenes[number])[name], grid=GRID)
        trajectory = self.sides.trajectory(case, number)
        with official_code.quiet():
            controller = self.controller(case)
        theirs = self.draw(controller, case, trajectory, pinned)
        plain = self.draw(None, case, trajectory)
        return self.sides.ours(case, trajectory), theirs, plain, trajectory


class MasaCtrl(SelfAttention):
    def __init__(self, sides, clones):
        self.sides, self.steps = sides, sides.bench.steps
        self.code, tools, drawing = official_code.read(
            clones["MasaCtrl"], "masactrl.masactrl", "masactrl.masactrl_utils", "masactrl.diffuser_utils"
        )
        self.register = tools.regiter_attention_editor_diffusers
        self.pipe = self.pipeline(drawing.MasaCtrlPipeline)

    def cases(self, scene):
        listed = self_parity.cases(scene)
        half = torch.zeros(1, 128, 128)
        half[..., :64] = 1  # whole tokens at every level
        for name, lies, goes in (
            ("masks of whole tokens", half, 1 - half),
            ("a soft target mask of whole tokens", half, 0.3 + 0.4 * half),
            ("a soft source mask of whole tokens", 0.4 + 0.2 * half, half),
        ):
            changed = (("source_mask", lies), ("target_mask", goes))
            listed = listed | {f"MasaCtrl, {name}": replace(listed["MasaCtrl"], changed=changed)}
        return listed

    def controller(self, case):
        given = case.settings
        window = [int(given[end] * self.steps) for end in ("start", "end")]
        settings = {"start_layer": given["layer"], "step_idx": list(range(*window)), "total_steps": self.steps}
        if given["source_mask"] is not None:
            masks = {"mask_s": given["source_mask"][0], "mask_t": given["target_mask"][0]}
            return self.code.MutualSelfAttentionControlMask(**settings, **masks)
        if given["source_words"]:
            words = {
                name: list(self.sides.prompt(text).columns(given[key]))
                for name, text, key in (
                    ("ref_token_idx", case.source, "source_words"), ("cur_token_idx", case.target, "target_words")
                )
            }  # fmt: skip
            return self.code.MutualSelfAttentionControlMaskAuto(**settings, thres=given["threshold"], **words)
        return self.code.MutualSelfAttentionControl(**settings)

    def checks(self):
        departures = {
            "MasaCtrl": "", "MasaCtrl, from 0.2 to 0.8 and layer 6": "", "MasaCtrl, drawn picture": "",
            "MasaCtrl, masks": CORNER, "MasaCtrl, drawn picture, masks of words": CORNER,
            "MasaCtrl, an empty source mask": EMPTY, "MasaCtrl, masks of whole tokens": "",
            "MasaCtrl, a soft target mask of whole tokens": "", "MasaCtrl, a soft source mask of whole tokens": SOFT,
        }  # fmt: skip
        for name, why in departures.items():
            yield Check("MasaCtrl", name, functools.partial(self.measure, name), why)
        free = functools.partial(self.measure, "MasaCtrl", pinned=False)
        yield Check("MasaCtrl", "MasaCtrl, without ref_intermediate_latents", free, FREE)


class FreePrompt(SelfAttention):
    def __init__(self, sides, clones):
        self.sides, self.steps = sides, sides.bench.steps
        folder = clones["EasyNLP"] / "diffusion" / "FreePromptEditing"
        names = ("freeprompt", "freeprompt_utils", "diffuser_utils")
        self.code, tools, drawing = official_code.read(folder, *(f"Freeprompt.{name}" for name in names))
        self.register = tools.register_attention_control_new
        self.pipe = self.pipeline(drawing.FreePromptPipeline)

    def cases(self, scene):
        listed = self_parity.cases(scene)
        window = replace(listed["FPE"], changed=(("start", 0.2), ("end", 0.6)))
        return {name: listed[name] for name in ("FPE", "FPE, until 0.4", "FPE, drawn picture")} | {
            "FPE, from 0.2 to 0.6": window
        }

    def controller(self, case):
        window = case.settings["start"], case.settings["end"]
        return self.code.SelfAttentionControlEdit([case.source, case.target], self.steps, window)

    def checks(self):
        for name in self.cases(self.sides.scenes[0]):
            yield Check("Free-Prompt-Editing", name, functools.partial(self.measure, name))


# ---- the table -------------------------------------------------------------------------------------------------------

# (method, the clones of which one is enough, who measures it and by which of its checks)
PARTS = (
    ("Inversions", ("prompt-to-prompt", "PnPInversion"), PromptToPrompt, "inversions"),
    ("Prompt-to-Prompt", ("prompt-to-prompt", "PnPInversion"), PromptToPrompt, "checks"),
    ("MasaCtrl", ("MasaCtrl",), MasaCtrl, "checks"),
    ("Free-Prompt-Editing", ("EasyNLP",), FreePrompt, "checks"),
    ("Direct inversion", ("PnPInversion",), Direct, "checks"),
    ("Dynamic Prompt Learning", ("DPL",), official_tokens.Words, "checks"),
    ("T2I-Adapter", ("T2I-Adapter",), official_tokens.Adapter, "checks"),
)


def lacking(title, clones):
    """Why a part cannot be measured with these clones, as a sentence; "" if it can."""
    needs = next(needs for name, needs, *_ in PARTS if name == title)
    if not any(name in clones for name in needs):
        places = " or ".join(f"{name} ({official_code.REPOSITORIES[name]})" for name in needs)
        return f"{title} is skipped: there is no clone of {places}."
    if title == "T2I-Adapter" and not official_code.file_of(clones[title], official_tokens.ADAPTER):
        return f"{title} is skipped: its clone has no branch {official_code.BRANCHES[title]}, which git fetch brings."
    # The controllers of Prompt-to-Prompt are in a notebook alone; PnPInversion has them as a file.
    alone = "prompt-to-prompt" in needs and "PnPInversion" not in clones
    if alone and not (clones["prompt-to-prompt"] / NOTEBOOK).is_file():
        return f"{title} is skipped: the clone of prompt-to-prompt has no {NOTEBOOK}, and there is no PnPInversion."
    return ""


def measured(check, count, vae):
    """The :class:`Row` of a check over the first ``count`` scenes; ``vae`` decodes their pictures."""
    apart, loud, effects = [], [], []
    for number in range(count):
        # Gradients are taken, which what is made in inference mode does not allow.
        with torch.inference_mode(False), torch.no_grad():
            ours, theirs, plain, trajectory = check.measure(number)
            apart.append(relative(ours, theirs))
            if trajectory is not None:
                pictures = (host.decode(vae, trajectory, latent) for latent in (ours, theirs))
                loud.append(psnr(*pictures))
            if plain is not None:
                effects.append(relative(plain, theirs))
    worst = float(torch.tensor(apart, dtype=torch.float64).max())  # max() may pass over what is not a number
    return Row(check, worst, min(loud, default=None), min(effects, default=None))


def table(rows):
    """The rows as Markdown."""
    heads = "method", "compared", "apart", "PSNR dB", "the method's own effect", "verdict"
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        loud = "" if row.decibels is None else f"{row.decibels:.1f}"
        effect = "" if row.effect is None else f"{row.effect:.2g}"
        cells = row.check.method, row.check.compared, f"{row.apart:.2g}", loud, effect, row.verdict
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rows, skipped, clones, whose_classes, args):
    """The whole page: whose code, at which commit, on what; the table; what was skipped."""
    versions = host.versions() | {name: importlib.metadata.version(name) for name in ("diffusers", "transformers")}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    whose = "\n".join(
        f"- {official_code.REPOSITORIES[name]} at {official_code.commit(folder)}" for name, folder in clones.items()
    )
    same = sum(row.holds and not row.check.departs for row in rows)
    other = sum(row.holds and bool(row.check.departs) for row in rows)
    left = "".join(f"\n{sentence}\n" for sentence in skipped)
    return (
        "# Beside the authors' own code\n\n"
        "Written by `python3 dev.py bench official --code FOLDER --keep`. The pack's nodes and the stock sampler "
        "beside the authors'\nclasses, imported as they are from clones of their repositories, with the demo model's "
        "weights, from the same noise, on\nthe papers' timesteps. None of their code is here.\n\n"
        f"{whose}\n\n"
        f"{datetime.date.today()}; {said}; fp32 on the CPU; {args.count} held-out scenes, {args.steps} steps, "
        f"guidance {args.guidance:g}, seed {args.seed}.\n\n"
        "Between their code and today's libraries stand: diffusers' attention under its older name; the host's "
        "tokenizer, text\nencoder and autoencoder; latents of 16x16 where they are told 512 pixels, and, for that "
        "size, the stored maps of 16x16\nin the blend. Of their notebook, where the clone has it, the definitions are "
        f"read, and nothing is run. Prompt-to-Prompt's\nclasses are of {whose_classes}. Dynamic Prompt Learning's "
        f"pipeline runs over {official_tokens.STEPS} steps, with at\nmost {official_tokens.LOOKS} looks and "
        f"{official_tokens.NULLS} updates of the empty text's embedding a step; its clusters are the pack's.\n\n"
        "`apart` is the largest distance over the scenes, the root mean square of the difference over that of theirs, "
        "of the last\nlatents where nothing else is said; `PSNR` the least between the pictures, 100 at most; "
        "`the method's own effect` the smallest\ndistance of theirs from their own drawing without the method. "
        f"The same is {SAME:g} or less, after null-text's updates {LEARNED:g}.\n\n"
        f"{same} rows are the same and {other} depart as declared, of {len(rows)}.\n\n{table(rows)}\n{left}"
    )


def options(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, default=os.environ.get("ATTUNE_OFFICIAL_CODE", ""),
                        help="the folder with the clones; ATTUNE_OFFICIAL_CODE without it")  # fmt: skip
    parser.add_argument("--count", type=int, default=2, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=20, help="a divisor of 1000, at most 50")
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a row's method and what is compared")
    parser.add_argument("--keep", action="store_true", help="write benchmark/OFFICIAL.md")
    return parser.parse_args(given)


def main(given=None):
    args = options(given)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    clones = official_code.find(args.code) if str(args.code) not in ("", ".") and args.code else {}
    if not clones:
        names = ", ".join(official_code.REPOSITORIES)
        log.info("There is no authors' code to compare with; clone %s into a folder and name it by --code.", names)
        return 0
    skipped = [sentence for title, *_ in PARTS if (sentence := lacking(title, clones))]
    for sentence in skipped:
        log.info("%s", sentence)
    bench = Bench(args.count, args.seed, args.steps, args.guidance)
    with torch.inference_mode(False), torch.no_grad():
        sides = Sides(bench)
        made = functools.cache(lambda kind: kind(sides, clones))
        chosen = [
            check
            for title, _, kind, which in PARTS
            if not lacking(title, clones)
            for check in getattr(made(kind), which)()
            if args.only.lower() in f"{check.method}, {check.compared}".lower()
        ]
    rows = []
    for number, check in enumerate(chosen, 1):
        begun = time.perf_counter()
        rows.append(row := measured(check, args.count, bench.vae))
        said = f"{row.apart:.2g}, {row.verdict.partition(':')[0]}, {time.perf_counter() - begun:.1f} s"
        log.info("%d of %d: %s, %s: %s", number, len(chosen), check.method, check.compared, said)
    log.info("\n%s", table(rows))
    if args.keep:
        classes = made(PromptToPrompt).name if not lacking("Prompt-to-Prompt", clones) else "no clone"
        PAGE.write_text(page(rows, skipped, clones, classes, args), encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
