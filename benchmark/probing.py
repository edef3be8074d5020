"""What a small network can read off attention maps: the probing analysis of Free-Prompt-Editing (sections 3.3 to 3.6).

Pictures of the demo world are drawn from "a <colour> <shape> on a gray background", the same noises for every class.
For each layer a two-layer perceptron learns to tell from a map which colour or shape was asked for, and is asked about
maps of noises that it never saw. The tables have the paper's layout, with its layers, counted from 1 as there:

    table 1   cross-attention of the word itself: shapes (the paper's animals), colours of one shape (its cars), colours
              of any shape (its "a <color> <object>")
    table 2   self-attention of the same pictures
    table 3   cross-attention of other words of "a <colour> circle": of the article, and of the noun

What the paper leaves open is an option here: a map is averaged over heads and over the steps looked at, or these stand
side by side. It does not say how many pictures it took, how it split them, how wide its networks were, nor whether its
tables show cars or objects; here every noise is in the test once, in one of four folds, and all widths are below. A
probe reads the probabilities themselves or their logarithms, which tell small ones apart. At the coarsest levels a
word's map can be almost the same for all noises: such a class is told right nearly always, or nearly never.

"a" stays "a" before "orange", as in the paper: an "an" would give that class away. CLIP reads from left to right, so
the article is encoded alike for every class: what its map knows has come to it from the picture, or from the other
words that it shares the attention with. The demo model's attention was taught, with a small loss, to keep nouns and
adjectives on their objects; Stable Diffusion's was not.

The figures are printed, and kept in benchmark/probing.json.

    dev.py bench probing --checkpoint FILE      the same of a Stable Diffusion 1.x checkpoint, with the paper's prompts

These are "a <color> car", "a <color> <object>" and "a/an <animal> standing in the park", ten classes each. The paper
names five colours, another in its text, and five animals, which are all here; the other classes, and the objects, are
this file's. No pictures are needed: they are drawn, and one a class is kept in demo/run/ beside the figures. Whether
they show what was asked for has to be looked at. Self-attention of more than ``--self-tokens`` picture tokens is
averaged over squares of these, without which that of one 512x512 picture would take 67 MB a layer.
"""

import argparse
import json
import logging
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import numpy as np
import torch
from safetensors import safe_open

from ..attention_patches.host import read_words
from ..attention_patches.values import attention_map
from ..demo import checker, scenes
from ..demo.measure import RUN, Bench, call, is_demo, save
from ..demo.model import WEIGHTS
from ..inversion import host
from ..nodes import invert, view

RESULTS = Path(__file__).parent / "probing.json"
BACKGROUND = "gray"  # a colour that no object has
COLOR, SHAPE = "red", "circle"
# What is asked about -> its classes, and what gives the colour and the shape for a class and a noise's number.
SETS = {
    "shapes": (scenes.SHAPES, lambda name, number: (COLOR, name)),
    "colours": (scenes.COLORS, lambda name, number: (name, SHAPE)),
    "colours of any shape": (scenes.COLORS, lambda name, number: (name, scenes.SHAPES[number % len(scenes.SHAPES)])),
}
# The paper's (section 3.3 and tables 1 to 3: the first five, and "coral"), filled up to ten.
COLORS = "green", "white", "orange", "yellow", "red", "coral", "blue", "black", "purple", "pink"
ANIMALS = "dog", "horse", "sheep", "leopard", "tiger", "cat", "rabbit", "cow", "bear", "elephant"
CAR = "car"
OBJECTS = CAR, "bus", "chair", "cup", "hat", "bag", "ball", "umbrella", "flower", "bird"
PAPERS_SETS = {
    "shapes": (ANIMALS, lambda name, number: ("", name)),
    "colours": (COLORS, lambda name, number: (name, CAR)),
    "colours of any shape": (COLORS, lambda name, number: (name, OBJECTS[number % len(OBJECTS)])),
}
ARTICLE, ADJECTIVE, NOUN, SELF = "article", "adjective", "noun", "self"
OWN_WORD = {"shapes": NOUN, "colours": ADJECTIVE, "colours of any shape": ADJECTIVE}
SHOWN = 3, 6, 9, 10, 12, 14, 16  # the layers of the paper's tables
FOLDS = 4
TOKENS = 256  # of self-attention, that are kept each by itself
# Of the perceptron: its width, how often it is shown all maps, AdamW's rate and decay.
HIDDEN, ROUNDS, RATE, DECAY = 64, 150, 3e-3, 1e-3
MEAN, BESIDE = "mean", "beside"
VALUES = {"probability": lambda maps: maps, "logarithm": lambda maps: maps.clamp(min=1e-30).log()}
# Averages of the paper's tables: over the five of its ten classes that each prints. (table, set, map) -> accuracy.
PAPER = {
    (1, "shapes", NOUN): 0.95,
    (1, "colours", ADJECTIVE): 0.84,
    (2, "shapes", SELF): 0.50,
    (2, "colours", SELF): 0.10,
    (3, "colours", ARTICLE): 0.10,
    (3, "colours", NOUN): 0.43,
}
PAPER_CHANCE = 0.1
CARRIES = 0.25  # share of the way from chance to always right from which on a map is said to carry the class
AHEAD = 0.05  # by how much an average has to lead to be called better
PAIRS = (
    (
        "{shapes} are read better off the word's cross-attention than off self-attention",
        (1, "shapes", NOUN),
        (2, "shapes", SELF),
    ),
    (
        "{colours} are read better off the word's cross-attention than off self-attention",
        (1, "colours", ADJECTIVE),
        (2, "colours", SELF),
    ),
    ('{colours} are read better at "{noun}" than at "a"', (3, "colours", NOUN), (3, "colours", ARTICLE)),
)
BLOCK = 40, 4  # pictures at a time, of the demo model and of a checkpoint
log = logging.getLogger("attune.bench")


# ---- prompts -----------------------------------------------------------------------------------------------------


def prompt(color, shape):
    return f"a {color} {shape} on a {BACKGROUND} background"


def article(noun):
    return "an" if noun[0] in "aeiou" else "a"


def papers_prompt(color, noun):
    """A colour's prompt, or, where it is "", an animal's."""
    return f"a {color} {noun}" if color else f"{article(noun)} {noun} standing in the park"


@dataclass(frozen=True)
class Prompts:
    """Sets of classes and the prompts that they are drawn from; ``noun`` is that of the set "colours"."""

    sets: dict
    prompt: Callable
    noun: str
    names: dict = field(default_factory=dict)  # a set -> its name in tables, where it is another

    def name(self, asked):
        return self.names.get(asked, asked)

    def positions(self, clip, color, noun):
        """Where the words stand that are looked at; of two articles the first."""
        text = self.prompt(color, noun)
        words = {ARTICLE: text.split()[0], NOUN: noun} | ({ADJECTIVE: color} if color else {})
        read = read_words(clip, text)
        return {name: read.find(word)[0] for name, word in words.items()}


DEMO = Prompts(SETS, prompt, SHAPE)
PAPERS = Prompts(
    PAPERS_SETS, papers_prompt, CAR,
    {"shapes": "animals", "colours": "colours of a car", "colours of any shape": "colours of any object"},
)  # fmt: skip


# ---- maps --------------------------------------------------------------------------------------------------------


class Gathered:
    """The maps of B pictures: feed :meth:`add` every attention layer's call.

    ``positions`` maps a word's name to its tokens' positions. Cross-attention is kept for each of these words, summed
    over its tokens, self-attention whole, or that of more than ``tokens`` picture tokens as :func:`squares` has it.
    Heads and steps are averaged ("mean") or stand side by side ("beside").
    """

    def __init__(self, positions, heads=MEAN, steps=MEAN, tokens=TOKENS):
        self.positions, self.heads, self.steps, self.tokens = positions, heads, steps, tokens
        self.found = {}  # map's name -> layer, in the order of the UNet -> what each step added, (B, width) fp32

    def add(self, place, own, heads):
        large = place.kind == "self" and place.tokens > self.tokens
        p = squares(own, place.grid, heads, self.tokens) if large else attention_map(own.q, own.k, heads)
        p = p.mean(1, keepdim=True) if self.heads == MEAN else p
        maps = {SELF: p} if place.kind == "self" else {w: p[..., list(at)].sum(-1) for w, at in self.positions.items()}
        for name, one in maps.items():
            seen = self.found.setdefault(name, {}).setdefault(place.layer, [])
            one = one.flatten(1).cpu()
            if self.steps == MEAN and seen:
                seen[0] += one  # its scale is nothing to a probe, which standardises what it is given
            else:
                seen.append(one)

    def maps(self):
        """Map's name -> one (B, width) a layer, in the order in which the UNet runs."""
        return {name: [torch.cat(seen, 1) for seen in layers.values()] for name, layers in self.found.items()}


def squares(own, grid, heads, tokens):
    """Self-attention (B, H, n, n) between squares of picture tokens, as few as leave n <= ``tokens``: the mean of how
    much the tokens of one look at all of another together; rows sum to 1. One head's map is held at a time."""
    side = next(f for f in range(1, max(grid) + 1) if math.ceil(grid[0] / f) * math.ceil(grid[1] / f) <= tokens)
    rows, columns = (torch.arange(n) // side for n in grid)
    member = torch.nn.functional.one_hot((rows[:, None] * (columns[-1] + 1) + columns).flatten()).to(own.q).float()
    mean, width, found = (member / member.sum(0)).T, own.q.shape[-1] // heads, []
    for q, k in zip(own.q.split(1), own.k.split(1), strict=True):
        pairs = zip(q.split(width, -1), k.split(width, -1), strict=True)
        found.append(torch.cat([mean @ (attention_map(*pair, 1)[0] @ member) for pair in pairs]))
    return torch.stack(found)


def positions(clip, color, shape):
    """Where the three words stand; of the two articles the object's."""
    return DEMO.positions(clip, color, shape)


def collect(
    bench, classes, describe, count, every, heads=MEAN, steps=MEAN, batch=BLOCK[0], prompts=DEMO, side=16, tokens=TOKENS
):
    """Draws ``count`` pictures of each class of one of :data:`SETS`, and looks at every ``every``-th step of each.

    Latents are ``side`` x ``side``. Returns name of map -> one (classes, count, width) a layer; the shares of pictures
    that show their colour and their shape, which is told of the demo's prompts only; and the first picture of each
    class.
    """
    sigmas = host.schedule(bench.model, bench.steps, host.HOST_GRID)
    generator = torch.Generator().manual_seed(bench.seed)
    noise = torch.randn(count, 4, side, side, generator=generator) * float(sigmas[0])
    euler, found, marks, shown = call(custom.KSamplerSelect, "euler")[0], [], [], []
    for name in classes:
        for first in range(0, count, batch):
            kinds = [describe(name, number) for number in range(first, min(first + batch, count))]
            text = bench.text(*(prompts.prompt(*k) for k in kinds))
            start = {"samples": host.to_host_scale(bench.model, noise[first : first + batch])}
            settings = False, bench.seed, bench.guidance, text, bench.text(""), euler, sigmas, start
            trajectory, latent = call(invert.AttuneRecordTrajectory, bench.model, *settings)[:2]
            at = prompts.positions(bench.clip, *kinds[0])  # every word of either set of prompts is one token
            gathered = Gathered(at, heads, steps, tokens)
            view.look(bench.model, text, trajectory, every, gathered.add, lambda *_: None)
            found.append(gathered.maps())
            pictures = bench.decode(latent)
            shown += [pictures[0]] if first == 0 else []
            if prompts is not DEMO:
                continue
            drawn = [scenes.scene(BACKGROUND, scenes.thing(shape, color)) for color, shape in kinds]
            marks += [checker.grade(p.numpy(), s) for p, s in zip(pictures, drawn, strict=True)]
        log.info("drawn: %s", name)
    maps = {
        name: [
            torch.cat([part[name][i] for part in found]).unflatten(0, (len(classes), count)) for i in range(len(layers))
        ]
        for name, layers in found[0].items()
    }
    asked = ("colours", "shapes") if marks else ()
    return maps, {k: round(float(np.mean([m[k] for m in marks])), 3) for k in asked}, shown


# ---- probes ------------------------------------------------------------------------------------------------------


def prepare(train, test, components=None):
    """Standardised features of maps (n, width) and (m, width).

    A map wider than there are maps to learn from is given by its leading components, by default by all that the maps
    to learn from have: n numbers say all that a network can learn of n maps, of self-attention at 16x16 instead of
    65,536. They keep their variances, the mean of which becomes 1.
    """
    mean, deviation = train.mean(0), train.std(0)
    deviation = deviation.clamp(min=1e-30).maximum(1e-5 * mean.abs())  # where nothing varies, rounding says nothing
    train, test = ((x - mean) / deviation for x in (train, test))
    count = components or len(train) - 1
    if count >= train.shape[1]:
        return train, test
    variances, basis = torch.linalg.eigh((train @ train.T).double())
    kept = (variances > 1e-6 * variances[-1]).nonzero()[-count:, 0]
    lengths, basis = variances[kept].sqrt(), basis[:, kept]
    test = (test @ train.T).double() @ basis / lengths
    scale = (variances[kept].mean() / len(train)).sqrt()
    return (basis * lengths / scale).float(), (test / scale).float()


def learn(features, labels, classes, seed):
    """A two-layer perceptron that tells ``labels`` (n,) from ``features`` (n, width)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(features.shape[1], HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, classes)
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(ROUNDS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(features), labels).backward()
        optimizer.step()
    return network


def probe(maps, seed=0, components=None):
    """For each of K classes, the share of its maps that are told right: ``maps`` is (K, noises, width).

    Of four networks each is asked about a quarter of the noises, after learning from the others.
    """
    classes, count = maps.shape[:2]
    if count < FOLDS:
        raise ValueError(f"There are {count} noises, but a probe needs at least {FOLDS}; raise --count.")
    with torch.inference_mode(False), torch.enable_grad():
        fold, right = torch.arange(count) % FOLDS, torch.zeros(classes, count)
        for turn in range(FOLDS):
            rest, asked = maps[:, fold != turn].clone(), maps[:, fold == turn].clone()
            features, questions = prepare(rest.flatten(0, 1), asked.flatten(0, 1), components)
            labels = torch.arange(classes).repeat_interleave(rest.shape[1])
            answers = learn(features, labels, classes, seed)(questions).argmax(1).unflatten(0, asked.shape[:2])
            right[:, fold == turn] = (answers == torch.arange(classes)[:, None]).float()
    return right.mean(1)


# ---- tables ------------------------------------------------------------------------------------------------------


def wanted(asked):
    """The (table, map) pairs of a set."""
    own = [(1, OWN_WORD[asked]), (2, SELF)]
    return own + [(3, ARTICLE), (3, NOUN)] if asked == "colours" else own


def shown_mean(accuracies):
    """The paper's "Avg.": over the layers that its tables show."""
    return float(np.mean([accuracies[layer - 1] for layer in SHOWN]))


def table(parts):
    """Parts, each its name and {class: accuracies of all layers}, as one Markdown table in the paper's layout.

    Below each part stands the mean of its classes, and the accuracy of guessing.
    """
    lines = ["| Class | " + " | ".join(f"Layer {n}" for n in SHOWN) + " | Avg. |", "|---" * (len(SHOWN) + 2) + "|"]
    for name, rows in parts.items():
        mean = {f"{name}: mean (chance {1 / len(rows):.2f})": np.mean(list(rows.values()), 0)}
        for label, values in (rows | mean).items():
            cells = [*(values[n - 1] for n in SHOWN), shown_mean(values)]
            lines.append(f"| {label} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    return "\n".join(lines)


TITLES = {
    1: "Table 1. Probing accuracy of cross-attention maps in different layers",
    2: "Table 2. Probing accuracy of self-attention maps in different layers",
    3: 'Table 3. Probing of cross-attention maps of other words of "a <colour> {noun}"',
}


def title(number, prompts=DEMO):
    return TITLES[number].format(noun=prompts.noun)


def part_name(number, asked, name, prompts=DEMO):
    if number != 3:
        return prompts.name(asked)
    return {ARTICLE: 'colours, at "a"', NOUN: f'colours, at "{prompts.noun}"'}[name]


def carries(accuracy, chance):
    """Whether so many right answers say that the class is there to be read."""
    return (accuracy - chance) / (1 - chance) >= CARRIES


def claims(found, prompts=DEMO):
    """For each of the paper's claims, in words, what it measured and what was measured here.

    ``found`` is {(table, set, map): {class: accuracies of all layers}}.
    """
    lines, verdict = [], {True: "confirmed", False: "contradicted"}
    ours = {key: float(np.mean([shown_mean(row) for row in rows.values()])) for key, rows in found.items()}
    for key in [key for key in PAPER if key in ours]:
        chance = 1 / len(found[key])
        said, seen = carries(PAPER[key], PAPER_CHANCE), carries(ours[key], chance)
        lines.append(
            f"Table {key[0]}, {part_name(*key, prompts)}: the paper's maps {'carry' if said else 'do not carry'} "
            f"the class, {PAPER[key]:.2f} where chance is {PAPER_CHANCE:.2f}; these {'do' if seen else 'do not'}, "
            f"{ours[key]:.2f} where chance is {chance:.2f}: {verdict[said == seen]}"
        )
    words = {asked: prompts.name(asked).capitalize() for asked in ("shapes", "colours")} | {"noun": prompts.noun}
    for what, first, second in PAIRS:
        if {first, second} <= ours.keys():
            lines.append(
                f"{what.format(**words)}: in the paper {PAPER[first]:.2f} against {PAPER[second]:.2f}, here "
                f"{ours[first]:.2f} against {ours[second]:.2f}: {verdict[ours[first] - ours[second] > AHEAD]}"
            )
    return lines


# ---- running -----------------------------------------------------------------------------------------------------


def weights_steps():
    with safe_open(str(WEIGHTS), "pt") as file:
        return int((file.metadata() or {}).get("steps", 0))


def written(found):
    """JSON in which a list of numbers takes one line."""
    return re.sub(r"\[\s+([-+.,\de\s]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(found, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="pictures of each class, each from its own noise")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=2, help="look at every n-th step")
    parser.add_argument("--guidance", type=float, default=5.0, help="5 draws what is asked for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--maps-of-heads", choices=(MEAN, BESIDE), default=MEAN)
    parser.add_argument("--maps-of-steps", choices=(MEAN, BESIDE), default=MEAN)
    parser.add_argument("--values", choices=tuple(VALUES), default="probability")
    parser.add_argument("--components", type=int, help="leading components that a probe is given; all unless told")
    parser.add_argument("--checkpoint", type=Path, help="a Stable Diffusion 1.x checkpoint, with the paper's prompts")
    parser.add_argument("--size", type=int, help="of a checkpoint's pictures, in pixels; 512, or 128 of a demo model's")
    parser.add_argument("--batch", type=int, help="pictures at a time; {}, or {} of a checkpoint's".format(*BLOCK))
    parser.add_argument("--self-tokens", type=int, default=TOKENS, help="fewer need less memory; 256 take about 4 GB")
    args = parser.parse_args()
    if args.size and (not args.checkpoint or args.size % 64):
        parser.error("--size is a multiple of 64, and goes with --checkpoint.")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    began, found, drawn, pictures = time.perf_counter(), {}, {}, []
    with torch.inference_mode():
        bench = Bench(args.count, args.seed, args.steps, args.guidance, args.checkpoint)
    prompts, size, block = DEMO, 128, BLOCK[0]
    if args.checkpoint:
        prompts, block = PAPERS, BLOCK[1]
        size = args.size or (128 if is_demo(args.checkpoint) else 512)
    for asked, (classes, describe) in prompts.sets.items():
        with torch.inference_mode():
            joined = args.maps_of_heads, args.maps_of_steps, args.batch or block, prompts, size // 8, args.self_tokens
            maps, drawn[asked], shown = collect(bench, classes, describe, args.count, args.every, *joined)
        pictures += shown
        for number, name in wanted(asked):
            layers = map(VALUES[args.values], maps[name])
            rows = torch.stack([probe(layer, args.seed, args.components) for layer in layers], 1).tolist()
            found[number, asked, name] = dict(zip(classes, rows, strict=True))
        log.info("%s: probed, %s", prompts.name(asked), drawn[asked])
    stem = f"probing_{args.checkpoint.stem}" if args.checkpoint else "probing"
    save(f"{stem}.png", pictures, max(len(classes) for classes, _ in prompts.sets.values()))
    tables = {n: {part_name(*key, prompts): rows for key, rows in found.items() if key[0] == n} for n in sorted(TITLES)}
    for number, parts in tables.items():
        log.info("\n%s\n\n%s", title(number, prompts), table(parts))
    log.info("\n%s", "\n".join(claims(found, prompts)))
    log.info("\n%.0f seconds, %.0f of the processor's", time.perf_counter() - began, time.process_time())
    settings = {name.replace("_", " "): value for name, value in vars(args).items()}
    if args.checkpoint:
        settings |= {"checkpoint": args.checkpoint.name, "size": size, "batch": args.batch or block}
        header = host.versions() | settings | {"classes": {prompts.name(n): c for n, (c, _) in prompts.sets.items()}}
    else:
        settings = {name: settings[name] for name in settings if name not in ("checkpoint", "size", "batch")}
        header = host.versions() | {"weights' steps": weights_steps()} | settings | {"drawn as asked": drawn}
    rounded = {
        title(number, prompts): {
            name: {label: [round(v, 3) for v in row] for label, row in rows.items()} for name, rows in parts.items()
        }
        for number, parts in tables.items()
    }
    kept = RUN / f"{stem}.json" if args.checkpoint else RESULTS
    kept.write_text(written(header | rounded | {"the paper's claims": claims(found, prompts)}) + "\n")
    log.info("kept in %s", kept)


if __name__ == "__main__":
    main()
