"""One input at several values, as one labelled sheet and a table. Run through ``python3 dev.py bench sweep``.

    dev.py bench sweep WORKFLOW.json --set "Attune Prompt Swap/cross_end" --values 0 0.2 0.4 0.6 0.8 1
    dev.py bench sweep p2p_ddim --set "Attune Prompt Swap/cross_end" --values 0 0.5 1 --data demo --count 2
    dev.py bench sweep WORKFLOW.json --set "Attune Prompt Reweight/weights" --as "red: {}" --values -2 -1 0 1 2
    dev.py bench sweep --kept                   those whose figures are in benchmark/sweeps.json, and that file

A workflow in the API format is drawn as it is, once a value; a method of benchmark/methods, or a file like those, edits
every sample of some data at every value and is measured. In the folder --out: sweep.jpg, the sheet; sweep.csv, for each
value every figure's mean and 95 % interval; and what ``bench run`` leaves, so a sweep that was stopped goes on.

Without --servers a ComfyUI is started that knows the demo model alone; it stands in for the workflow's checkpoint.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import logging
import math
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..tests import host
from . import datasets, prompts, results, runner, servers

ROOT = Path(__file__).resolve().parents[1]
# The nodes need ComfyUI in this process; this file of them does not.
_spec = importlib.util.spec_from_file_location("attune_sheet", ROOT / "nodes" / "sheet.py")
sheet = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sheet)
OUT = ROOT / "demo" / "run" / "sweep"
KEPT = ROOT / "benchmark" / "sweeps.json"
CHANGE = "change %"  # from the first value's picture
SHOWN = results.SUCCESS, "PSNR kept", CHANGE
TIMES, SEED = 2000, 0  # of the bootstrap
log = logging.getLogger("attune.bench")

# Prompt-to-Prompt's "varied number of steps" and fader, MaSaFusion's figure 12 and CPAM's figure 6.
EDIT = "--data demo --count 2 --kinds colour shape pattern"
COMMANDS = {
    "P2P, cross_end": f'p2p_ddim --set "Attune Prompt Swap/cross_end" --values 0 0.2 0.4 0.6 0.8 1 {EDIT}',
    "P2P, weight of red": (
        'benchmark/fader.workflow.json --set "Attune Prompt Reweight/weights" --as "red: {}" '
        "--values -2 -1 0 0.5 1 1.5 2"
    ),
    "MaSaFusion without a sketch, end": (
        f'masafusion_source --set "Attune Source Fusion/end" --values 0 0.2 0.4 0.6 0.8 1 {EDIT}'
    ),
    "CPAM, guidance": f'cpam --set "SamplerCustom/cfg" --values 2 5 7.5 12 {EDIT}',
}


@dataclass
class Sweep:
    """What came of one: ``values`` as they are shown; ``figures``, name -> a list for each value of the figures of its
    pictures; and ``rows`` of the sheet, each a list of (label, path of a picture or None)."""

    title: str
    values: list
    figures: dict = field(default_factory=dict)
    rows: list = field(default_factory=list)
    failed: list = field(default_factory=list)

    def table(self) -> list[dict]:
        """For each value and figure its mean, the ends of its 95 % interval and how many pictures it is of."""
        lines = []
        for name, each in self.figures.items():
            for value, found in zip(self.values, each, strict=True):
                low, high = interval(found) if len(found) > 1 else (None, None)
                mean = sum(found) / len(found) if found else None
                lines.append({"value": value, "figure": name, "mean": mean, "low": low, "high": high, "n": len(found)})
        return lines


def interval(values: list[float]) -> tuple[float, float]:
    """The ends of a mean's 95 % interval: Wilson's for percentages that are 0 or 100 alone, else by the bootstrap."""
    values = np.asarray(values, float)
    count = len(values)
    if set(values.tolist()) <= {0.0, 100.0}:
        share, z = float(values.mean()) / 100, 1.959964
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        return tuple(100 * round(min(1.0, max(0.0, end)), 9) for end in (middle - half, middle + half))
    drawn = np.random.default_rng(SEED).integers(0, count, (TIMES, count))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


# ---- values ------------------------------------------------------------------------------------------------------


def as_json(text: str):
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def read_place(text: str) -> str:
    if not all(text.rpartition("/")):
        raise ValueError(f'"{text}" is not "title of nodes/input"; write for example "SamplerCustom/cfg".')
    return text


def read_fixed(told: list[str]) -> dict:
    """{"title/input": value} of arguments "title/input=value"."""
    pairs = [text.partition("=") for text in told]
    return {read_place(place): as_json(value) for place, _, value in pairs}


def values_of(args) -> list:
    """What the input gets, in order; with --as each value is put into that text."""
    if args.form is None:
        return [as_json(text) for text in args.values]
    if "{}" not in args.form:
        raise ValueError(f'--as "{args.form}" has no {{}}, where the value goes; write for example "red: {{}}".')
    return [args.form.replace("{}", text) for text in args.values]


# ---- a method over data ------------------------------------------------------------------------------------------


def variants(method: prompts.Method, place: str, values: list, fixed: dict) -> list[prompts.Method]:
    """The method once for each value; what is swept or fixed goes before what the method sets for the demo model."""
    made = []
    for number, value in enumerate(values):
        own = {**fixed, place: value}
        key = f"{method.key}-{number}-{re.sub(r'[^A-Za-z0-9.-]+', '_', str(value))}"
        demo = {**method.demo, **own}
        made.append(replace(method, key=key, name=str(value), inputs={**method.inputs, **own}, demo=demo))
    return made


def sweep_method(args, method: prompts.Method) -> Sweep:
    usual = {"size": 512, "steps": 50, "guidance": 7.5} if args.checkpoint else {}
    usual |= {name: value for name in ("size", "steps", "guidance") if (value := getattr(args, name)) is not None}
    setup = prompts.Setup(args.checkpoint, seed=args.seed, **usual)
    samples, problems = datasets.read(args.data, args.out / "samples", args.count, args.seed)
    kinds = {sample.kind for sample in samples}
    if strange := set(args.kinds) - kinds:
        raise ValueError(f"--kinds has {', '.join(strange)}, but the data has {', '.join(sorted(kinds))}.")
    samples = [sample for sample in samples if sample.kind in (args.kinds or kinds)]
    made = variants(method, args.place, values_of(args), args.fixed)
    run = runner.Run(args.out, samples, made, setup)
    for problem in (*problems, *run.problems):
        log.warning("%s", problem)
    if not run.digests:
        raise ValueError(f"The method {method.key} is for no sample of {args.data}; see what it needs in its file.")
    runner.draw(run, args.servers, "")
    measured, _ = runner.measure(run, args.networks)
    found = Sweep(f"{method.name}: {args.place}", list(args.values))
    lines = [[measured.get(*task, run.digests[task]) for task in run.digests if task[1] == m.key] for m in made]
    names = dict.fromkeys(name for each in lines for line in each if line for name in line["metrics"])
    for name in names:
        each = [[line["metrics"].get(name) for line in group if line] for group in lines]
        found.figures[name] = [[value for value in group if value is not None] for group in each]
    found.figures = {name: each for name, each in found.figures.items() if any(each)}
    first = {sample.kind: sample for sample in reversed(list(run.samples.values()))}
    for sample in run.samples.values():
        tasks = [(sample.key, m.key) for m in made]
        if first[sample.kind] is sample and any(task in run.digests for task in tasks):
            row = [("source", sample.picture)] + [("true edit", sample.truth)] * bool(sample.truth)
            drawn = [run.picture(task) if task in run.digests and run.is_drawn(task) else None for task in tasks]
            found.rows.append(row + list(zip(args.values, drawn, strict=True)))
    failures = [(task, run.drawn.get(*task, digest) or {}) for task, digest in run.digests.items()]
    found.failed = [f"{' '.join(task)}: {line['failed']}" for task, line in failures if "failed" in line]
    return found


# ---- a workflow --------------------------------------------------------------------------------------------------


def read_workflow(path: Path) -> dict:
    """The nodes of a workflow in the API format, each with a title; raises ValueError for what is none."""
    try:
        nodes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a workflow: {error}.") from None
    if not isinstance(nodes, dict) or not all(isinstance(n, dict) and "class_type" in n for n in nodes.values()):
        raise ValueError(f"{path} is no workflow in the API format; export it by Workflow > Export (API) in ComfyUI.")
    return {number: {"_meta": {"title": node["class_type"]}, **node} for number, node in nodes.items()}


def result_of(nodes: dict, title: str) -> str:
    """The number of the node whose picture counts: the one of this title, or the only one that shows pictures."""
    shows = {n: node for n, node in nodes.items() if node["class_type"] in ("SaveImage", "PreviewImage")}
    if title:
        shows = {n: node for n, node in shows.items() if node["_meta"]["title"] == title}
    if len(shows) != 1:
        titles = ", ".join(node["_meta"]["title"] for node in shows.values()) or "none"
        raise ValueError(f"The workflow has to show one picture, but {titles} do; choose one by its title in --result.")
    return next(iter(shows))


def job_of(nodes: dict, result: str, changes: dict) -> servers.Job:
    """The workflow with other inputs; a value "@FILE" is a picture of this machine. Raises ValueError for a node or an
    input that the workflow has not."""
    nodes = {number: {**node, "inputs": dict(node["inputs"])} for number, node in prompts.needed(nodes, result).items()}
    files = {}
    for place, value in changes.items():
        title, _, name = place.rpartition("/")
        found = [node for node in nodes.values() if title in (node["_meta"]["title"], node["class_type"])]
        if not found:
            titles = ", ".join(dict.fromkeys(node["_meta"]["title"] for node in nodes.values()))
            raise ValueError(f"No node {title!r} leads to the picture of the workflow, only {titles}.")
        if isinstance(value, str) and value.startswith("@"):
            path = Path(value[1:])
            value = f"attune-sweep-{prompts.digest(path)}{path.suffix}"
            files[value] = path.read_bytes()
        for node in found:
            prompts.put(nodes, node, name, value)
    shown = {"images": nodes[result]["inputs"]["images"]}
    nodes[result] = {**nodes[result], "class_type": "PreviewImage", "inputs": shown}
    return servers.Job(nodes, result, files)


def sweep_workflow(args, path: Path) -> Sweep:
    nodes = read_workflow(path)
    result = result_of(nodes, args.result)
    if args.checkpoint or not args.servers:
        prompts.load(nodes, args.checkpoint)
    jobs = [job_of(nodes, result, {**args.fixed, args.place: value}) for value in values_of(args)]
    found, drawn = Sweep(f"{path.name.partition('.')[0]}: {args.place}", list(args.values)), {}
    args.out.mkdir(parents=True, exist_ok=True)

    def keep(task, server, kind, value, seconds):
        if kind == servers.DRAWN:
            drawn[task] = args.out / f"{task}.png"
            drawn[task].write_bytes(value)
        else:
            found.failed.append(f"{args.values[task]}: {value}")
            log.warning("%s failed: %s", args.values[task], value)

    with runner.workers(args.servers, "") as (crew, _):
        servers.Crew([list(range(len(jobs)))], jobs.__getitem__, keep).work(crew)
    found.rows = [[(label, drawn.get(task)) for task, label in enumerate(args.values)]]
    pictures = {task: picture_of(path) for task, path in drawn.items()}
    if 0 in pictures:
        alike = [t for t in range(len(jobs)) if t in pictures and pictures[t].shape == pictures[0].shape]
        apart = {task: 100 * float((pictures[task] - pictures[0]).abs().mean()) for task in alike}
        found.figures[CHANGE] = [[apart[task]] if task in apart else [] for task in range(len(jobs))]
    return found


# ---- what is shown -----------------------------------------------------------------------------------------------


def picture_of(path: Path):
    """A picture file as (H, W, 3) in 0..1."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)


def draw_sheet(found: Sweep, height: int) -> Image.Image:
    """The rows of a sweep under its title; a picture that is not there is left dark."""
    rows = []
    for row in found.rows:
        pictures = [torch.zeros(height, height, 3) if path is None else picture_of(path) for _, path in row]
        labels = [label if path is not None else f"{label}\nnot drawn" for label, path in row]
        rows.append(sheet.to_pil(sheet.contact_sheet(pictures, labels, height)[0]))
    font, top = ImageFont.load_default(15), 26
    width = max([round(font.getlength(found.title)) + 2 * sheet.GAP, *(row.width for row in rows)])
    out = Image.new("RGB", (width, top + sum(row.height for row in rows)), sheet.PAPER)
    ImageDraw.Draw(out).text((sheet.GAP, 6), found.title, sheet.INK, font)
    for row in rows:
        out.paste(row, (0, top))
        top += row.height
    return out


def as_csv(found: Sweep) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["value", "figure", "mean", "low", "high", "n"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in found.table())
    return file.getvalue()


def as_text(found: Sweep) -> str:
    """A line for each value with its most telling figures, as "mean (low to high)"."""
    names = [name for name in SHOWN if name in found.figures]
    lines = {(line["value"], line["figure"]): line for line in found.table()}

    def cell(line):
        low, high = line["low"], line["high"]
        between = "" if low is None else f" ({results.number(low)} to {results.number(high)})"
        return results.number(line["mean"]) + between

    rows = [[value, *(cell(lines[value, name]) for name in names)] for value in found.values]
    return "\n".join("  ".join(str(text).ljust(24) for text in row).rstrip() for row in [["value", *names], *rows])


# ---- the command -------------------------------------------------------------------------------------------------


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", help="a workflow's file in the API format, or a method's name or file")
    parser.add_argument("--set", dest="place", metavar="TITLE/INPUT", help="the input that is swept")
    parser.add_argument("--values", nargs="+", default=[], help="read as JSON where they are that")
    parser.add_argument("--as", dest="form", metavar="TEXT", help='a text that holds the value at {}: "red: {}"')
    parser.add_argument(
        "--with", dest="fixed", action="append", default=[], metavar="TITLE/INPUT=VALUE", help="another input, fixed"
    )
    parser.add_argument("--result", default="", help="title of the workflow's node whose picture counts")
    parser.add_argument("--data", default=runner.DEMO, help="for a method: demo (default) or a format with its folder")
    parser.add_argument("--count", type=int, default=2, help="samples of each kind of edit, 2 by default; 0 is all")
    parser.add_argument("--kinds", nargs="+", default=[], help="the only kinds of edits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--servers", nargs="+", default=[], metavar="URL", help="by default one is started")
    parser.add_argument("--out", type=Path, default=OUT, help=f"by default {OUT.relative_to(ROOT)}")
    parser.add_argument("--networks", type=Path, help="a folder of the networks that metrics need")
    parser.add_argument("--checkpoint", default="", metavar="NAME", help="on the servers")
    for name, kind in (("size", int), ("steps", int), ("guidance", float)):
        parser.add_argument(f"--{name}", type=kind, help="for a method, as in bench run")
    parser.add_argument("--height", type=int, default=128, help="pixels of a picture on the sheet, 128 by default")
    parser.add_argument("--kept", action="store_true", help=f"write {KEPT.relative_to(ROOT)} anew")
    return parser


def sweep(args) -> Sweep:
    """Draws and measures one; raises ValueError for what cannot be swept."""
    if not (args.what and args.place and args.values):
        raise ValueError("A sweep needs a workflow or a method, --set and --values; --help shows examples.")
    if len(set(args.values)) < len(args.values):
        raise ValueError("--values has a value twice; leave one out.")
    if args.checkpoint and not args.servers:
        raise ValueError("--checkpoint needs --servers: a ComfyUI started for this has no checkpoint but the demo's.")
    args.place, args.fixed = read_place(args.place), read_fixed(args.fixed)
    args.out = args.out.resolve()
    path = Path(args.what)
    if path.suffix == ".json" and path.is_file():
        told = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(told, dict) and isinstance(told.get("workflow"), str)):
            return sweep_workflow(args, path)
    return sweep_method(args, prompts.read_method(args.what))


def write_kept(urls: list[str]) -> None:
    """benchmark/sweeps.json and its sheet, by the commands above."""
    kept, sheets = {}, []
    with runner.workers(urls, "") as (_, urls):
        for number, (title, command) in enumerate(COMMANDS.items()):
            args = parser_of().parse_args(shlex.split(command))
            args.what = str(ROOT / args.what) if args.what.endswith(".json") else args.what
            args.servers, args.out = urls, OUT / f"kept-{number}"
            found = replace(sweep(args), title=title)
            log.info("%s\n%s\n", title, as_text(found))
            lines = [line for line in found.table() if line["figure"] in (*SHOWN, "L1")]
            rounded = [{k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()} for line in lines]
            kept[title] = {"command": f"python3 dev.py bench sweep {command}", "figures": rounded}
            sheets.append(draw_sheet(replace(found, rows=found.rows[:2]), 80))
    lines = [f' {json.dumps(title)}: {{\n  "command": {json.dumps(one["command"])},\n  "figures": [\n   '
             + ",\n   ".join(map(json.dumps, one["figures"])) + "\n  ]\n }" for title, one in kept.items()]  # fmt: skip
    KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sheet.rows_of(sheets, 1).save(KEPT.with_suffix(".jpg"), quality=82)


def main(argv: list[str] | None = None):
    args = parser_of().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        if args.kept:
            return write_kept(args.servers)
        found = sweep(args)
    except (host.HostError, ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    draw_sheet(found, args.height).save(args.out / "sweep.jpg", quality=88)
    (args.out / "sweep.csv").write_text(as_csv(found), encoding="utf-8")
    log.info("%s\n%s\nLook at %s", found.title, as_text(found), args.out / "sweep.jpg")


if __name__ == "__main__":
    main()
