"""Context preserving without each of its parts (CPAM, figure 4), in the demo world.

The paper shows that without localized extraction the prompt does not reach the object alone, that without preservation
adaptation the surroundings change, and that a share of plain layers lets both grow together. Each row leaves one out,
or changes that share. Shape and removals of held-out scenes, true masks, the setting that suits the demo model: how
often the edit succeeds, with the 95 % interval, and how far the rest is from the source. Figures are kept in
benchmark/editing.json.
"""

import argparse
import logging

import comfy.utils
import torch

from ..demo.measure import RUN
from . import cost
from .editing import Studio
from .layers import figures, table
from .self_editing import CPAM, EMPTYING, KINDS, OWN, REMOVAL, SHAPE, WHOLE, Room, mark

ASKED = SHAPE, REMOVAL, EMPTYING
ROWS = {
    "as in the paper": {},
    "without localized extraction": {"extraction": False},
    "without preservation adaptation": {"preservation": False},
    "no plain layers": {"plain_share": 0.0},
    "plain layers, a share of 0.3": {"plain_share": 0.3},
}
log = logging.getLogger("attune.bench")


def measure(room):
    """(row's name, kind) -> the marks of its pictures."""
    found = {}
    for i, asked in enumerate(room.asked):
        for kind in ASKED:
            task = asked[KINDS.index(kind)]
            source, truth = room.source(i, kind), room.truth(i, task)
            for name, settings in ROWS.items():
                picture = room.edited(i, task, CPAM, {"guidance": OWN, "prompt": WHOLE, **settings})
                found.setdefault((name, kind), []).append(mark(task, picture, source, truth))
        log.info("scene %d of %d", i + 1, len(room.asked))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="held-out scenes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with torch.inference_mode():
        studio = Studio(args.steps, args.seed, RUN / "modules" / f"{args.steps} steps, seed {args.seed}")
        marks = measure(Room.open(studio, "edits", args.count, args.seed))
    rows = {name: {kind: figures(marks[name, kind]) for kind in ASKED} for name in ROWS}
    log.info("\n%s", table(rows, ASKED))
    cost.keep("self quality", "modules", {"scenes": args.count, "steps": args.steps, "seed": args.seed, "rows": rows})


if __name__ == "__main__":
    main()
