"""What proximal guidance does to word swaps after negative-prompt inversion, by its quantile and its rule.

Colour and shape of held-out scenes, from DDIM inversion, with the caption as negative: how often the edit succeeds,
with the 95 % interval, and how far the rest is from the source; beside that, picture by picture, what each setting adds
to the rest against none, and how many edits it loses and wins. Figures are kept in benchmark/editing.json, pictures in
demo/run.
"""

import argparse
import itertools
import logging
import shutil
from dataclasses import replace

import comfy.utils
import numpy as np
import torch

from ..attention_patches.proximal import RULES
from ..demo.measure import RUN, call, save
from ..nodes import edit, guidance, invert
from . import cost
from .editing import Studio
from .layers import OUTSIDE, SUCCESS, figures, table
from .self_editing import COLOUR, EVERYWHERE, KINDS, PAPER, SHAPE, draw_tasks, mark

ASKED = COLOUR, SHAPE
NONE = "none"
ROWS = {NONE: (0.0, RULES[0])} | {
    f"{rule}, {quantile:g}": (quantile, rule) for rule, quantile in itertools.product(RULES, (0.5, 0.7, 0.8))
}
log = logging.getLogger("attune.bench")


def swap(bench, task, trajectory, quantile, rule, cross_end=0.8, self_end=0.4):
    """The MODEL and the positive of a word swap under proximal guidance."""
    windows = 0.0, cross_end, 0.0, self_end, EVERYWHERE
    model, positive = call(edit.AttunePromptSwap, bench.model, bench.clip, trajectory, *task.prompts, *windows)
    return call(guidance.AttuneProximalGuidance, model, quantile, rule)[0], positive


def captioned(bench, trajectory, caption):
    """The trajectory with its caption as negative."""
    known = replace(trajectory, conditioning=bench.text(caption))
    return call(invert.AttuneNegativePromptInversion, known)[0]


def against(marks, plain):
    """Of a row's marks beside those without proximal guidance: the mean gain outside with its 95 % error, and how many
    pictures succeed in one of both alone."""
    gains = [
        m[OUTSIDE] - p[OUTSIDE] for m, p in zip(marks, plain, strict=True) if None not in (m[OUTSIDE], p[OUTSIDE])
    ]
    won = [(m[SUCCESS] > 0, p[SUCCESS] > 0) for m, p in zip(marks, plain, strict=True)]
    return {
        "outside gains dB": round(float(np.mean(gains)), 2),
        "its error": round(1.96 * float(np.std(gains, ddof=1)) / len(gains) ** 0.5, 2) if len(gains) > 1 else None,
        "edits won": sum(a and not b for a, b in won),
        "edits lost": sum(b and not a for a, b in won),
    }


def measure(studio, asked, strength):
    """(row's name, kind) -> the marks of its pictures; the first scenes of each kind as sheets."""
    runs = studio.invert([row[KINDS.index(COLOUR)].source for row in asked], f"proximal {len(asked)}")
    found = {}
    for kind in ASKED:
        strips = []
        for i, (row, run) in enumerate(zip(asked, runs, strict=True)):
            task = row[KINDS.index(kind)]
            known = captioned(studio.bench, run, task.prompts[0])
            strip = [studio.source(f"{i} source", run), studio.truth(f"{i} {kind} truth", task.target)]
            source, truth = strip
            for name, settings in ROWS.items():
                file = f"{i} {kind} {name}, guidance {strength:g}"
                strip.append(studio.draw(file, known, strength, swap, studio.bench, task, known, *settings))
                found.setdefault((name, kind), []).append(mark(task, strip[-1], source, truth))
            strips += strip if i < 4 else []
            log.info("%s: scene %d of %d", kind, i + 1, len(asked))
        save(f"proximal_{kind}.png", [torch.from_numpy(p) for p in strips], len(strip))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=PAPER)
    parser.add_argument("--resume", action="store_true", help="go on with the pictures that a stopped run left")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder = RUN / "proximal" / f"{args.steps} steps, seed {args.seed}"
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    with torch.inference_mode():
        marks = measure(Studio(args.steps, args.seed, folder), draw_tasks(args.count, args.seed), args.guidance)
    rows = {}
    for name in ROWS:
        rows[name] = {kind: figures(marks[name, kind]) for kind in ASKED}
        if name != NONE:
            for kind in ASKED:
                rows[name][kind]["against none"] = against(marks[name, kind], marks[NONE, kind])
    log.info("\n%s", table(rows, ASKED))
    for name, kind in itertools.product(list(ROWS)[1:], ASKED):
        log.info("%s, %s: %s", name, kind, rows[name][kind]["against none"])
    kept = {"scenes": args.count, "steps": args.steps, "seed": args.seed, "guidance": args.guidance, "rows": rows}
    cost.keep("quality", "proximal", kept)


if __name__ == "__main__":
    main()
