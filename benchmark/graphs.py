"""Shipped workflows with a mistake in each, run over HTTP on a real server: what the user is told, and what it harms.

One input of one of the pack's nodes is spoiled: a number beyond its range or NaN, typed or by a link; a text that is
long, empty or holds half an emoji; a choice that is on no list; a value in place of a link, another node's output, an
odd picture, mask or text, nothing at all. What may come of it: the graph runs, ComfyUI refuses it, or a node ends it
with one clear sentence. What may not: a bare error of Python's in one of the pack's nodes, a picture of NaN, a queue
that stands still, or a good workflow that draws another picture than before. The same seed makes the same mistakes.
"""

import argparse
import collections
import copy
import io
import json
import logging
import math
import random
import re
import sys
import urllib.error
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..tests import host
from ..tests.server import workflow

WORKFLOWS = (
    "Attune - Demo word swap", "Attune - Null-text inversion", "Attune - Local blend", "Attune - Replace an object",
    "Attune - Redraw without a sketch", "Attune - Dynamic prompt learning", "Attune - Prompts by region",
)  # fmt: skip
MOST = {"steps": 4, "inner_steps": 1, "null_steps": 1}  # in each workflow, so that it takes a few seconds
GOOD_EVERY = 10  # graphs from one good run to the next
PATIENCE = 40  # seconds until a graph counts as slow and is cancelled
LONGEST = 1300  # letters of a message

RAN, REFUSED, CLEAR, STOCK, SLOW = "ran", "refused at once", "clear sentence", "a stock node's error", "slow"
BARE, NAN, CHANGED = "bare error", "picture of NaN", "good workflow changed"
OUTCOMES = RAN, REFUSED, CLEAR, STOCK, SLOW, BARE, NAN, CHANGED
BAD = BARE, NAN, CHANGED
log = logging.getLogger("attune.bench")


# ---- mistakes ----------------------------------------------------------------------------------------------------

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
HALF = "\ud83d"
TEXTS = (
    "", " ", HALF, f"a red {HALF}", "a red circle " * 8000, "circle", "{", "a {circle} and a {square}", ":,;()", "\0",
    "red: nan, circle: 1e999", "\U0001f34e \u202e", "embedding:none", "((((red", "\n\n", "../../x",
)  # fmt: skip
VALUES = "-5", 5, -1, 1.5, math.nan, None, True, [], ["1"], [1, 2, 3], {}, {"samples": 1}, "", HALF
HUGE = 1 << 62
# What else a socket can be given: a stock node and its inputs; a text encoder's output stands where None is.
ODD = {
    "IMAGE": [
        ("EmptyImage", {"width": width, "height": height, "batch_size": count, "color": 0x808080})
        for width, height, count in ((1, 1, 1), (64, 72, 1), (300, 20, 1), (128, 128, 3))
    ],
    "MASK": [
        ("SolidMask", {"value": value, "width": width, "height": height})
        for value, width, height in ((math.nan, 64, 64), (0.0, 64, 64), (1.0, 1, 1), (0.5, 300, 2))
    ],
    "LATENT": [
        ("EmptyLatentImage", {"width": width, "height": height, "batch_size": count})
        for width, height, count in ((16, 16, 1), (64, 512, 1), (128, 128, 3))
    ],
    "CONDITIONING": [
        ("ConditioningZeroOut", {"conditioning": None}),
        ("ConditioningCombine", {"conditioning_1": None, "conditioning_2": None}),
        ("ConditioningConcat", {"conditioning_to": None, "conditioning_from": None}),
    ],
    "SIGMAS": [
        ("KarrasScheduler", {"steps": steps, "sigma_max": first, "sigma_min": last, "rho": 7.0})
        for steps, first, last in ((1, 14.0, 0.03), (4, 0.03, 14.0), (4, 14.0, 14.0))
    ],
}


def small(name):
    """A shipped workflow on the demo model, with few steps."""
    prompt = workflow.load(name)
    if name != workflow.DEMO:
        prompt = workflow.in_the_demo_world(prompt)
    for inputs in (node["inputs"] for node in prompt.values()):
        inputs.update({key: min(inputs[key], most) for key, most in MOST.items() if isinstance(inputs.get(key), int)})
    return prompt


def spoiled(prompt, info, dice):
    """A copy of a workflow with one mistake, the mistake's kind, and what it is. ``info`` is the server's."""
    prompt = copy.deepcopy(prompt)
    node = dice.choice([n for n, one in prompt.items() if one["class_type"].startswith("Attune") and one["inputs"]])
    inputs, kind = prompt[node]["inputs"], prompt[node]["class_type"]
    slots = info[kind]["input"].get("required", {}) | info[kind]["input"].get("optional", {})
    name = dice.choice(sorted(slots))
    what, value = _mistake(prompt, node, name, slots[name], info, dice)
    inputs[name] = value
    if what == "missing input":
        del inputs[name]
    linked = prompt.get(value[0], {}) if isinstance(value, list) and value and isinstance(value[0], str) else {}
    shown = json.dumps([linked.get("class_type"), linked.get("inputs")] if linked else value)
    return prompt, what, f"{kind}.{name} = {shown[:100]}"


def _mistake(prompt, node, name, slot, info, dice):
    """A kind of mistake for the input ``name`` of ``node``, and the value that makes it."""
    kind, settings = "COMBO" if isinstance(slot[0], list) else slot[0], (*slot, {})[1]
    roll = dice.random()
    if roll < 0.06:
        return "missing input", None
    if roll < 0.16:
        return "value of another kind" if kind in WIDGETS else "value in place of a link", dice.choice(VALUES)
    if kind in ("INT", "FLOAT"):
        low, high = settings["min"], settings["max"]
        odd = [low - 1, high + 1, -1, -HUGE, HUGE, low]
        odd += [high] if name not in MOST else []  # which is right, and takes minutes
        odd += [low + (high - low) / 3, math.nan, math.inf, -math.inf] if kind == "FLOAT" else []
        if roll < 0.35:
            return "number", dice.choice(odd)
        return "number by a link", workflow.add(prompt, f"Primitive{kind.title()}", value=dice.choice(odd))
    if kind in ("STRING", "COMBO", "BOOLEAN"):
        if roll < 0.55:
            return "text", dice.choice(TEXTS)
        return "text by a link", workflow.add(prompt, "PrimitiveString", value=dice.choice(TEXTS))
    if kind in ODD and roll < 0.6:
        texts = [n for n, one in prompt.items() if one["class_type"] == "CLIPTextEncode"]
        stock, inputs = dice.choice(ODD[kind])
        inputs = {key: [dice.choice(texts), 0] if value is None else value for key, value in inputs.items()}
        return "odd picture, mask or text", workflow.add(prompt, stock, **inputs)
    before = _behind(prompt, node)
    outputs = [
        ([n, i], type_)
        for n, one in prompt.items() if n not in before
        for i, type_ in enumerate(info[one["class_type"]]["output"])
    ]  # fmt: skip
    alike = [socket for socket, type_ in outputs if type_ == kind]
    return "another node's output", dice.choice(alike if alike and roll < 0.93 else [socket for socket, _ in outputs])


def _behind(prompt, node):
    """``node`` and all that needs it: a link from there to it would be a ring."""
    found = {node}
    while more := {
        n for n, one in prompt.items() if n not in found
        for value in one["inputs"].values() if isinstance(value, list) and value[0] in found
    }:  # fmt: skip
        found |= more
    return found


# ---- running them ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a graph: one of OUTCOMES, what was said, and the saved pictures by title and number."""

    kind: str
    said: str = ""
    pictures: dict = field(default_factory=dict)


class Dead(Exception):
    """The server does not work through its queue any more."""


def run(server, prompt):
    """The :class:`Outcome` of an API prompt. Raises Dead."""
    try:
        prompt_id = server.post("/prompt", {"prompt": prompt})["prompt_id"]
    except urllib.error.HTTPError as error:
        return Outcome(REFUSED, error.read()[:500].decode(errors="replace"))
    try:
        entry = server.wait_for_history(prompt_id, timeout=PATIENCE)
    except host.HostError:
        server.interrupt()
        try:
            server.wait_for_history(prompt_id, timeout=2 * PATIENCE)
        except host.HostError as error:
            raise Dead(str(error)) from None
        return Outcome(SLOW)
    for event, data in entry["status"]["messages"]:
        if event == "execution_error":
            return _told(data)
    pictures = {}
    for node, result in entry["outputs"].items():
        if prompt[node]["class_type"] == "SaveImage":
            for number, image in enumerate(result["images"]):
                pixels = np.asarray(Image.open(io.BytesIO(server.view(image))))
                pictures[prompt[node]["_meta"]["title"], number] = pixels
                mask = prompt[prompt[node]["inputs"]["images"][0]]["class_type"] == "MaskToImage"
                if not pixels.any() and not mask:  # black is what NaN is saved as
                    return Outcome(NAN, prompt[node]["_meta"]["title"])
    return Outcome(RAN, "", pictures)


def _told(error):
    said, kind = error["exception_message"].strip(), error["exception_type"]
    if kind == "ExecutionBlocked":  # a sentence behind the host's own words
        said, kind = said.removeprefix("Execution Blocked: "), "ValueError"
    if kind == "ValueError" and said.endswith(".") and "\n" not in said and len(said) <= LONGEST:
        return Outcome(CLEAR, said)
    last = (error["traceback"] or [""])[-1]
    ours = error["node_type"].startswith("Attune") or re.search(r"custom_nodes[/\\]attune[/\\]", last)
    return Outcome(BARE if ours else STOCK, f"{error['node_type']}: {kind}: {said[:300]}")


def check(server, count, seed, names=WORKFLOWS):
    """Runs ``count`` graphs with a mistake, and a good workflow now and then. Yields of each the mistake's kind, what
    it is and its :class:`Outcome`; of good workflows only those that changed. Raises Dead."""
    info, dice, first = server.object_info(), random.Random(seed), {}
    for number in range(count):
        name = names[number % len(names)]
        prompt, kind, what = spoiled(small(name), info, dice)
        yield kind, f"{number}, {name}: {what}", run(server, prompt)
        if (number + 1) % GOOD_EVERY == 0 or number == count - 1:
            name = names[number // GOOD_EVERY % len(names)]
            good = run(server, small(name))
            if name not in first:
                workflow.forget(server)
                first[name] = run(server, small(name)).pictures
            # What a mistake left as it was ComfyUI has kept from it, and draws no picture of it again.
            same = all(np.array_equal(pixels, first[name].get(key)) for key, pixels in good.pictures.items())
            if good.kind != RAN or not same:
                yield "none", f"{number}, {name}", Outcome(CHANGED, f"{good.kind} {good.said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many graphs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    found, faults = collections.defaultdict(collections.Counter), 0
    with host.Server(host.Host.current(), cpu=True) as server:
        try:
            for kind, what, outcome in check(server, args.count, args.seed):
                found[kind][outcome.kind] += 1
                faults += outcome.kind in BAD
                if outcome.kind in (*BAD, SLOW, STOCK):
                    log.info("%s: %s: %s", outcome.kind, what, outcome.said)
        except Dead as problem:
            log.info("The queue stands still: %s", problem)
            faults += 1
        if "invalid value encountered" in server.log_path.read_text(encoding="utf-8", errors="replace"):
            log.info("%s, says the server's log", NAN)
            faults += 1
    found["all"] = sum(found.values(), collections.Counter())
    log.info("| | graphs | %s |\n%s", " | ".join(OUTCOMES), "|---" * (len(OUTCOMES) + 2) + "|")
    for kind, counts in found.items():
        log.info("| %s | %d | %s |", kind, sum(counts.values()), " | ".join(str(counts[one]) for one in OUTCOMES))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
