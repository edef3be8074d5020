"""In which layers Prompt-to-Prompt and Free-Prompt-Editing keep the source's structure, and what comes of it.

Both papers keep it in the layers of at most 32x32 tokens where Stable Diffusion's finest have 64x64, since in all
layers it "hinders successful editing" (Free-Prompt-Editing, figure 4). The demo model's finest layers have 16x16
tokens, so the same layers are there those of at most 64 tokens, 3 to 13 counted from 1, or 4 to 14 as the paper counts.

Each row is a method with its layers and windows. Colour, shape and background of held-out scenes, from DDIM inversion:
how often the edit succeeds, with the 95 % interval, how far the rest is from the source, and what the layers decide of
the paper's claim that Free-Prompt-Editing changes colours which Prompt-to-Prompt cannot. Figures are kept in
benchmark/editing.json.
"""

import argparse
import logging
import shutil

import comfy.utils
import numpy as np
import torch
from scipy import stats

from ..demo.measure import RUN, save
from . import cost
from .editing import Studio
from .self_editing import (
    BACKGROUND,
    COLOUR,
    EVERYWHERE,
    FPE,
    KINDS,
    OWN,
    P2P,
    PAPER,
    PAPERS_LAYERS,
    SHAPE,
    Room,
    mark,
)

ASKED = COLOUR, SHAPE, BACKGROUND
ROWS = {
    f"{P2P}, all layers": (P2P, {"cross_end": 0.8, "self_end": 0.4, "token_limit": EVERYWHERE}),
    f"{P2P}, at most 64 tokens": (P2P, {"cross_end": 0.8, "self_end": 0.4, "token_limit": PAPERS_LAYERS}),
    f"{P2P}, all layers, self until 0.8": (P2P, {"cross_end": 0.8, "self_end": 0.8, "token_limit": EVERYWHERE}),
    f"{P2P}, at most 64 tokens, self until 0.8": (
        P2P,
        {"cross_end": 0.8, "self_end": 0.8, "token_limit": PAPERS_LAYERS},
    ),
    f"{FPE}, all layers": (FPE, {"end": 0.8, "token_limit": EVERYWHERE}),
    f"{FPE}, at most 64 tokens": (FPE, {"end": 0.8, "token_limit": PAPERS_LAYERS}),
    f"{FPE}, layers 4-14": (FPE, {"end": 0.8, "layers": "4-14"}),
    f"{FPE}, layers 4-14, every step": (FPE, {"end": 1.0, "layers": "4-14"}),
}
CLAIM = [  # the rows that are held against each other, Free-Prompt-Editing's first
    (f"{FPE}, all layers", f"{P2P}, all layers"),
    (f"{FPE}, at most 64 tokens", f"{P2P}, at most 64 tokens"),
    (f"{FPE}, layers 4-14, every step", f"{P2P}, at most 64 tokens"),
]
SUCCESS, OUTSIDE = "success %", "outside dB"
log = logging.getLogger("attune.bench")


def share(won):
    """Of a list of bools: (percentage, its 95 % interval by Wilson as percentages)."""
    found = stats.binomtest(sum(won), len(won)).proportion_ci(method="wilson")
    return round(100 * float(np.mean(won)), 1), [round(100 * found.low, 1), round(100 * found.high, 1)]


def figures(marks):
    """A row's figures from the marks of its pictures."""
    percent, interval = share([m[SUCCESS] > 0 for m in marks])
    apart = [m[OUTSIDE] for m in marks if m[OUTSIDE] is not None]
    error = 1.96 * float(np.std(apart, ddof=1)) / len(apart) ** 0.5 if len(apart) > 1 else None
    return {
        "pictures": len(marks),
        SUCCESS: percent,
        "its interval": interval,
        OUTSIDE: round(float(np.mean(apart)), 2),
        "its error": error and round(error, 2),
    }


def judge(first, second):
    """Whether one row changes colours that another cannot, picture by picture. ``first`` and ``second`` are marks.

    The paper's claim is confirmed where the first succeeds in more pictures alone than the second does alone, by a
    two-sided sign test at 5 %, contradicted where it is the other way round, and open else.
    """
    won = [(a[SUCCESS] > 0, b[SUCCESS] > 0) for a, b in zip(first, second, strict=True)]
    alone, other = sum(a and not b for a, b in won), sum(b and not a for a, b in won)
    chance = stats.binomtest(alone, alone + other).pvalue if alone + other else 1.0
    verdict = "open" if chance > 0.05 else "confirmed" if alone > other else "contradicted"
    return {"succeeds alone": alone, "the other alone": other, "chance": round(float(chance), 4), "verdict": verdict}


def measure(room, guidance, kinds):
    """(row's name, kind) -> the marks of its pictures; the first scenes of each kind as sheets."""
    found = {}
    for kind in kinds:
        strips = []
        for i, asked in enumerate(room.asked):
            task = asked[KINDS.index(kind)]
            source, truth = strip = [room.source(i, kind), room.truth(i, task)]
            for name, (method, settings) in ROWS.items():
                strip.append(room.edited(i, task, method, {"guidance": guidance, **settings}))
                found.setdefault((name, kind), []).append(mark(task, strip[-1], source, truth))
            strips += strip if i < 4 else []
            log.info("%s, guidance %g: scene %d of %d", kind, guidance, i + 1, len(room.asked))
        save(f"layers_{kind}_{guidance:g}.png", [torch.from_numpy(p) for p in strips], len(strip))
    return found


def table(found, kinds):
    lines = ["| | " + " | ".join(kinds) + " |", "|" + "---|" * (len(kinds) + 1)]
    for name, row in found.items():
        cells = []
        for kind in kinds:
            told, (low, high) = row[kind], row[kind]["its interval"]
            cells.append(f"{told[SUCCESS]:.0f} % ({low:.0f} to {high:.0f}), {told[OUTSIDE]:.1f} dB")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with the pictures that a stopped run left")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder = RUN / "layers" / f"{args.steps} steps, seed {args.seed}"
    if not args.resume:
        shutil.rmtree(folder, ignore_errors=True)
    with torch.inference_mode():
        room = Room.open(Studio(args.steps, args.seed, folder), "layers", args.count, args.seed)
        kept = {"scenes": args.count, "steps": args.steps, "seed": args.seed}
        for guidance, kinds in ((OWN, ASKED), (PAPER, (COLOUR,))):
            marks = measure(room, guidance, kinds)
            rows = {name: {kind: figures(marks[name, kind]) for kind in kinds} for name in ROWS}
            claims = {f"{a} / {b}": judge(marks[a, COLOUR], marks[b, COLOUR]) for a, b in CLAIM}
            log.info("\nGuidance %g\n%s", guidance, table(rows, kinds))
            for pair, told in claims.items():
                log.info("%s: %s", pair, told)
            kept[f"guidance {guidance:g}"] = {"rows": rows, "colours that the other cannot change": claims}
    cost.keep("self quality", "layers", kept)


if __name__ == "__main__":
    main()
