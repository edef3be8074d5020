"""Prompt-to-Prompt edits beside the paper's procedure on diffusers. Run through ``python3 dev.py bench edit-parity``.

Same weights, same noise, same choices: for each held-out scene a picture is drawn from its caption and recorded, each
edit is drawn by the pack's nodes and the stock sampler, and again by :mod:`reference_p2p`. Every figure is printed, and
kept in benchmark/editing.json.

    cases           how far the last latents and the pictures lie apart, beside what the edit itself changes
    differences     where the pack departs from the authors' code on purpose, and by how much
    one source row  the paper's source row, which runs freely under guidance, beside the pinned one, on real pictures
"""

import argparse
import functools
import logging
from dataclasses import dataclass

import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import torch

from ..demo import model as demo_model
from ..demo import scenes
from ..demo.measure import Bench, call
from ..inversion import host
from ..inversion.report import decibels, psnr
from ..nodes import edit, invert
from . import cost, to_diffusers
from . import reference_p2p as paper
from .inversion import GRIDS, relative

SWAP, REFINE, NONE = "swap", "refine", "none"
BLEND = 0.3, 0.2, 256  # threshold, start, tokens
PIECES = "squirrelfish"  # one word, several tokens
log = logging.getLogger("attune.bench")


@dataclass(frozen=True)
class Case:
    """One edit, as both sides are told it. ``kind`` says what stands before the re-weighting, if there is one."""

    source: str
    target: str
    kind: str = SWAP
    cross: tuple = (0.0, 0.8)
    self_: tuple = (0.0, 0.4)
    limit: int = 1024
    word_windows: tuple = ()  # (word, (start, end)) pairs
    preserve: tuple = ()
    weights: tuple = ()  # (word, factor) pairs
    weight_windows: tuple = ()  # (word, (start, end)) pairs, of the factors
    inside: tuple = ()
    outside: tuple = ()
    source_inside: tuple = ()  # with these the words above are the target's alone
    source_outside: tuple = ()
    outside_threshold: float = 0.0  # 0 for the same as inside
    cross_layers: str = ""
    self_layers: str = ""
    grid: str = host.HOST_GRID


def cases(scene):
    """Name -> :class:`Case`, for a scene of two objects, whose patterns are taken off them."""
    scene = scenes.edit_thing(scenes.edit_thing(scene, 0, pattern="plain"), 1, pattern="plain")
    thing, other = scene.things
    used = {thing.color, other.color, scene.background}
    color = next(c for c in scenes.COLORS if c not in used)
    shape = next(s for s in scenes.SHAPES if s not in (thing.shape, other.shape))
    source = scenes.caption(scene)
    recolored = scenes.caption(scenes.edit_thing(scene, 0, color=color))
    reshaped = scenes.caption(scenes.edit_thing(scene, 0, color=color, shape=shape))
    striped = scenes.caption(scenes.edit_thing(scene, 0, pattern="striped"))
    alone = scenes.caption(scenes.remove_thing(scene, 1))
    in_pieces = recolored.replace(color, PIECES, 1)
    tail = " and" + " and".join([" a small white star"] * 20)
    return {
        "swap": Case(source, recolored),
        "swap, more tokens in the new word": Case(source, in_pieces),
        "swap, fewer tokens in the new word": Case(in_pieces, recolored),
        "swap of two words": Case(source, reshaped),
        "swap, other windows and token limit": Case(
            source, reshaped, cross=(0.1, 0.6), self_=(0.2, 0.9), limit=64
        ),
        "swap, a window for one word": Case(source, recolored, word_windows=((color, (0.2, 0.5)),)),
        "swap, one word preserved": Case(source, reshaped, preserve=(other.shape,)),
        "swap, cross-attention in layers 1-6 and 8": Case(source, recolored, cross_layers="1-6, 8"),
        "swap, self-attention in layers 4-14": Case(source, reshaped, self_layers="4-14"),
        "swap, a word of three for CLIP and one between spaces": Case(
            source.replace(thing.color, "t-shirt", 1), recolored
        ),
        "swap, prompts over 77 tokens": Case(source + tail, in_pieces + tail),
        "refine, a word added": Case(source, striped, REFINE),
        "refine, words removed": Case(source, alone, REFINE),
        "re-weight by 2": Case(source, source, NONE, weights=((thing.color, 2.0),)),
        "re-weight by 0": Case(source, source, NONE, weights=((thing.color, 0.0),)),
        "re-weight by -1": Case(source, source, NONE, weights=((thing.color, -1.0),)),
        "re-weight after swap": Case(source, recolored, weights=((color, 2.0), ("background", 0.5))),
        "re-weight after swap, a window for one word": Case(
            source, recolored, word_windows=((color, (0.0, 0.4)),), weights=((color, 2.0),),
            weight_windows=((color, (0.0, 0.4)),),
        ),
        "re-weight after swap, the window not the factor's": Case(
            source, recolored, word_windows=((color, (0.0, 0.4)),), weights=((color, 2.0),)
        ),
        "re-weight after refine": Case(source, striped, REFINE, weights=(("striped", 3.0),)),
        "swap, local blend": Case(source, reshaped, self_=(0.0, 0.0), inside=(thing.shape, shape)),
        "refine, local blend with a word outside": Case(
            source, striped, REFINE, inside=(thing.shape, other.shape), outside=(other.shape,)
        ),
        "swap, local blend by pairs of words": Case(
            source, reshaped, self_=(0.0, 0.0), inside=(other.shape,), source_inside=(thing.shape,),
        ),
        "swap, local blend with two thresholds": Case(
            source, reshaped, self_=(0.0, 0.0), inside=(thing.shape, shape), outside=(other.shape,),
            outside_threshold=0.05,
        ),
        "re-weight, local blend": Case(source, source, NONE, weights=((thing.color, -1.0),), inside=(thing.shape,)),
        "swap, the papers' timesteps": Case(source, reshaped, inside=(thing.shape, shape), grid=host.PAPERS_GRID),
    }  # fmt: skip


def _stretches(windows):
    return ", ".join(f"{word}: {a}-{b}" for word, (a, b) in windows)


def read_layers(text):
    """The layers, from 0, that "1-6, 8" counts from 1; None for no text."""
    spans = [[int(end) for end in part.split("-")] for part in text.split(",") if part]
    return frozenset(n for span in spans for n in range(span[0] - 1, span[-1])) or None


# ---- the two sides ---------------------------------------------------------------------------------------------------


class Sides:
    """The demo model for both sides, and the empty text. What was drawn once is kept."""

    def __init__(self, bench):
        self.bench = bench
        self.network = self.unet()
        self.euler = call(custom.KSamplerSelect, "euler")[0]
        self.empty = bench.text("")
        self.record, self.ours, self.theirs = map(functools.cache, (self.record, self.ours, self.theirs))

    def unet(self):
        """The bench's network in diffusers' layout."""
        return to_diffusers.unet(demo_model.read_weights()["unet"])

    def record(self, caption, grid, seed):
        """The trajectory of a picture drawn from a caption at the bench's guidance."""
        sigmas = host.schedule(self.bench.model, self.bench.steps, grid)
        blank = {"samples": torch.zeros(1, 4, 16, 16)}
        arguments = True, seed, self.bench.guidance, self.bench.text(caption), self.empty
        return call(invert.AttuneRecordTrajectory, self.bench.model, *arguments, self.euler, sigmas, blank)[0]

    def ours(self, case, trajectory):
        """The last latent (1, 4, h, w) that the pack's nodes and the stock sampler draw."""
        model, clip = self.bench.model, self.bench.clip
        positive = self.bench.text(case.target)
        spans = (*case.cross, *case.self_, case.limit)
        if case.kind != NONE:
            node = {SWAP: edit.AttunePromptSwap, REFINE: edit.AttunePromptRefine}[case.kind]
            words = _stretches(case.word_windows), ", ".join(case.preserve), case.cross_layers, case.self_layers
            model, positive = call(node, model, clip, trajectory, case.source, case.target, *spans, *words)
        if case.weights:
            weights = ", ".join(f"{word}: {factor:g}" for word, factor in case.weights)
            spans = *spans, _stretches(case.weight_windows)
            model, positive = call(edit.AttunePromptReweight, model, clip, trajectory, case.target, weights, *spans)
        if case.inside:
            words = ", ".join(case.inside), ", ".join(case.outside)
            prompts = case.source, case.target
            pairs = ", ".join(case.source_inside), ", ".join(case.source_outside), case.outside_threshold
            arguments = *prompts, *words, *BLEND, None, *pairs
            model, positive = call(edit.AttuneLocalBlend, model, clip, trajectory, *arguments)
        return self.drawn(model, positive, self.empty, trajectory)

    def drawn(self, model, positive, negative, trajectory):
        """The last latent (1, 4, h, w) that the stock sampler draws from a trajectory's noise."""
        texts, sigmas = (self.bench.guidance, positive, negative), trajectory.sigmas
        noise = {"samples": host.host_latent(trajectory, 0)}
        drawn = call(custom.SamplerCustom, model, False, 0, *texts, self.euler, sigmas, noise)[0]
        return host.to_model_scale(self.bench.model, drawn["samples"]) / (1 + sigmas[-1] ** 2).sqrt()

    def trajectory(self, case, number):
        """The picture that a case edits: the held-out scene ``number``."""
        return self.record(case.source, case.grid, self.bench.seed + number)

    def prompt(self, text):
        """A prompt for the reference: raw tokens and the embedding, from the host's own tokenizer and encoder."""
        tokenizer = self.bench.clip.tokenizer
        ids = [token for chunk in next(iter(self.bench.clip.tokenize(text).values())) for token, *_ in chunk]
        spelled = [tokenizer.untokenize([(token, 1.0)])[0][1] for token in ids]
        pieces = ["" if piece.startswith("<|") else piece.removesuffix("</w>") for piece in spelled]
        return paper.Prompt(text, tuple(ids), tuple(pieces), self.bench.text(text)[0][0])

    def theirs(self, case, trajectory, quirk=False):
        """The paper's last latents (1, 4, h, w), source and target, and its last blend mask (1, 1, h, w) or None."""
        source, target = self.prompt(case.source), self.prompt(case.target)
        steps = self.bench.steps
        if case.kind == NONE:
            mapper, keep = paper.same(target)
        else:
            mapper, keep = {SWAP: paper.swap, REFINE: paper.refine}[case.kind](source, target, quirk)
        words = dict(case.word_windows) | dict.fromkeys(case.preserve, case.cross)
        # The authors' code bounds a word's factor as it bounds its map; the pack only where it is told to.
        apart = case.weights and case.word_windows and not quirk
        layers = (read_layers(text) for text in (case.cross_layers, case.self_layers))
        cross = (0.0, 0.0) if case.preserve else case.cross
        wanted = paper.Edit(
            mapper=mapper,
            keep=keep,
            scale=paper.factors(target, dict(case.weights)),
            alpha=paper.windows(target, steps, cross, words),
            self_steps=tuple(int(share * steps) for share in case.self_),
            self_limit=1 << 20 if case.self_layers else case.limit,
            scale_alpha=paper.windows(target, steps, case.cross, dict(case.weight_windows)) if apart else None,
            **dict(zip(("cross_layers", "self_layers"), layers, strict=True)),
        )
        blend = None
        if case.inside:
            told = (case.source_inside, case.inside), (case.source_outside, case.outside)
            marks = [
                torch.stack([source.indicator(ours or theirs), target.indicator(theirs)]) for ours, theirs in told
            ]
            blend = paper.Blend(*marks, *BLEND, case.outside_threshold or None)
        noise = trajectory.latents[0] / (1 + trajectory.sigmas[0] ** 2).sqrt()
        # A long prompt needs a null as long; attention cannot tell repeated columns from one.
        null = self.empty[0][0].repeat(1, len(target.ids) // paper.CHUNK, 1)
        texts = source, target, null, self.bench.guidance
        latents, mask = paper.draw(self.network, GRIDS[case.grid], noise, *texts, steps, wanted, blend)
        # Without the papers' last step, which is onto itself: the pack does not take it.
        return *latents[len(trajectory.sigmas) - 1].split(1), mask

    def picture(self, trajectory, latent):
        return host.decode(self.bench.vae, trajectory, latent)


# ---- what is measured ------------------------------------------------------------------------------------------------


def measure_cases(sides):
    """Name -> the largest relative distance of the last latents, the least PSNR between the pictures (100 dB at most),
    and the smallest relative distance between the edit and plain drawing from its target prompt, over the scenes.
    """
    found = {}
    drawn, _, _ = sides.bench.scenes(objects=2)
    for number, scene in enumerate(drawn):
        for name, case in cases(scene).items():
            trajectory = sides.trajectory(case, number)
            ours = sides.ours(case, trajectory)
            free, theirs, _ = sides.theirs(case, trajectory)
            nothing = Case(case.target, case.target, NONE, cross=(0.0, 0.0), self_=(0.0, 0.0), grid=case.grid)
            plain = sides.theirs(nothing, trajectory)[1]
            pinned = trajectory.latents[-1] / (1 + trajectory.sigmas[-1] ** 2).sqrt()
            row = found.setdefault(name, {"latents apart": [], "pictures dB": [], "source rows apart": [], "edit": []})
            row["latents apart"].append(relative(ours, theirs))
            row["pictures dB"].append(psnr(sides.picture(trajectory, ours), sides.picture(trajectory, theirs)))
            row["source rows apart"].append(relative(pinned, free))
            row["edit"].append(relative(theirs, plain))
        log.info("scene %d of %d", number + 1, len(drawn))
    worst = {"latents apart": max, "pictures dB": min, "source rows apart": max, "edit": min}
    return {name: {key: worst[key](row[key]) for key in row} for name, row in found.items()}


# Where the pack departs from the authors' code, and the case that shows it.
QUIRKS = {
    "what follows a word with more tokens": "swap, more tokens in the new word",
    "what follows a word with fewer tokens": "swap, fewer tokens in the new word",
    "padding that would read a removed word": "refine, words removed",
    "a word's window and its factor": "re-weight after swap, the window not the factor's",
}


def measure_differences(sides, cases=cases, quirks=QUIRKS):
    """Name -> mean relative distance of the pack's last latents from the right reference and from the authors' own."""
    found = {}
    drawn, _, _ = sides.bench.scenes(objects=2)
    for number, scene in enumerate(drawn):
        for name, key in quirks.items():
            case = cases(scene)[key]
            trajectory = sides.trajectory(case, number)
            ours = sides.ours(case, trajectory)
            row = found.setdefault(name, {"from the right one": [], "from the authors' code": []})
            row["from the right one"].append(relative(ours, sides.theirs(case, trajectory)[1]))
            row["from the authors' code"].append(relative(ours, sides.theirs(case, trajectory, quirk=True)[1]))
    return {name: {key: sum(v) / len(v) for key, v in row.items()} for name, row in found.items()}


def measure_source_row(sides, margin=4):
    """Real pictures, inverted at guidance 1 as the papers do, then swapped under guidance: how well the source comes
    back in either source row, and the background (``margin`` pixels off the true mask) in either edit; mean dB.

    No null embeddings are learned: with those the free row comes back as well (see inversion.json), for many times the
    work; pinned, it needs none, and one row a step in place of two.
    """
    bench, found = sides.bench, {}
    drawn, pictures, masks = bench.scenes(objects=2)
    for scene, picture, mask in zip(drawn, pictures.split(1), masks, strict=True):
        color = next(c for c in scenes.COLORS if c not in {t.color for t in scene.things} | {scene.background})
        case = Case(scenes.caption(scene), scenes.caption(scenes.edit_thing(scene, 0, color=color)))
        latent = bench.encode(picture)
        trajectory = bench.invert(latent, bench.text(case.source))[0]
        free, theirs, _ = sides.theirs(case, trajectory)
        rows = {
            "the autoencoder alone": bench.decode(latent),
            "source row, free (paper)": sides.picture(trajectory, free),
            "source row, pinned (Attune)": sides.picture(trajectory, trajectory.latents[-1]),
        }
        edits = {
            "background of the edit, free (paper)": sides.picture(trajectory, theirs),
            "background of the edit, pinned (Attune)": sides.picture(trajectory, sides.ours(case, trajectory)),
        }
        off = torch.nn.functional.max_pool2d(mask[:1], 2 * margin + 1, 1, margin)[0] == 0
        for name, image in rows.items():
            found.setdefault(name, []).append(psnr(image, picture))
        for name, image in edits.items():
            found.setdefault(name, []).append(decibels((image - picture).square()[:, off]))
    return {name: {"PSNR dB": sum(values) / len(values)} for name, values in found.items()}


# What is measured, and on how many times as many scenes as asked for.
PARTS = {
    "cases": (measure_cases, 1),
    "differences": (measure_differences, 1),
    "one source row": (measure_source_row, 4),
}


def table(found, first=""):
    """Rows of figures as Markdown."""
    keys = list(next(iter(found.values())))
    lines = [f"| {first} | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{row[key]:.4g}" for key in keys) + " |" for name, row in found.items()]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2, help="held-out scenes; four times as many for the source row")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    settings = {"scenes": args.count, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    for name, (measure, times) in PARTS.items():
        with torch.inference_mode():
            found = measure(Sides(Bench(times * args.count, args.seed, args.steps, args.guidance)))
        log.info("\n%s\n", table(found, name))
        cost.keep("parity", name, settings | {"scenes": times * args.count} | rounded(found))


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
