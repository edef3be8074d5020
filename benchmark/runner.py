"""Any methods over any data, on one or many ComfyUI servers. Run through ``python3 dev.py bench run``.

    dev.py bench run                                        every method on the demo world, on a ComfyUI of its own
    dev.py bench run --data pie-bench:FOLDER --servers http://127.0.0.1:8188 http://gpu2:8188 --checkpoint NAME
    dev.py bench run --ray ADDRESS --servers URL ...        a worker on each node of a Ray cluster for each URL
    dev.py bench run --methods p2p_ddim fpe --count 2       some of benchmark/methods, or JSON files like those
    dev.py bench run --set "fpe:SamplerCustom/cfg=5"        another setting; "*" in the method's place is all of them
    dev.py bench run --page                                 the demo world, and its page benchmark/RESULTS.md

It draws pictures, measures them, and writes results.md and results.html. A run that was stopped goes on where it was,
and draws again only what was changed, failed or is missing. In the folder --out: drawn.jsonl and pictures/, by method;
measured.jsonl; samples/, the data as the methods get it.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..tests import host
from . import datasets, prompts, rating, results, servers
from .metrics import COLUMNS, SETS, Metrics, demo_success
from .prompts import NotApplicable

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "demo" / "run" / "quality"
PAGE = ROOT / "benchmark" / "RESULTS.md"
DEMO = "demo"
SOURCE = "generated_source"  # the method that draws the pictures of samples that bring none
SERVERS = "servers.json"  # in the folder of a run: what drew it
SHOWS = "pictures in which a program that knows the demo world sees the true result and no more; higher is better"
log = logging.getLogger("attune.bench")


# ---- what is kept ------------------------------------------------------------------------------------------------


class Lines:
    """JSON objects in a file, one a line; the last one for a sample and a method counts. Each is on the disk before the
    next is begun."""

    def __init__(self, path: Path):
        self.path, self.found = path, {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # what was being written when the power went
                self._take(json.loads(line))

    def _take(self, line):
        self.found[line["sample"], line["method"]] = line

    def add(self, line: dict) -> None:
        with self.path.open("a+b") as file:
            if file.tell() and not _ends(file):
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._take(line)

    def get(self, sample: str, method: str, digest: str) -> dict | None:
        """The line of a picture, if it is of this digest."""
        line = self.found.get((sample, method))
        return line if line and line["digest"] == digest else None


def _ends(file):
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


class Run:
    """The pictures of a run: which are asked for, which are there, and where."""

    def __init__(self, out: Path, samples: list, methods: list, setup: prompts.Setup):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.setup = out, setup
        self.methods = {method.key: method for method in methods}
        self.samples, self.problems = {}, []
        for sample in samples:
            try:
                self.samples[sample.key] = prompts.prepare(sample, setup.size, out / "samples")
            except Exception as problem:  # Pillow raises many kinds for a broken file
                self.problems.append(f"Sample {sample.key} has a picture that breaks off ({problem}); it is left out.")
        self.drawn = Lines(out / "drawn.jsonl")
        self.digests, self.not_applicable = {}, {}
        for sample in self.samples.values():
            for method in methods:
                task = sample.key, method.key
                try:
                    self.digests[task] = self.prompt(task).digest
                except NotApplicable as lack:
                    self.not_applicable[task] = str(lack)

    def source(self, sample: datasets.Sample) -> datasets.Sample:
        """The sample with the picture that the edit starts from, where that is generated: None until it is drawn."""
        task = sample.key, SOURCE
        if sample.picture or task not in self.digests or not self.is_drawn(task):
            return sample
        return replace(sample, picture=self.picture(task))

    def prompt(self, task: tuple[str, str]) -> prompts.Prompt:
        """In later turns the picture is the result of the turn before, named by its digest. Raises NotApplicable."""
        sample, method = self.samples[task[0]], self.methods[task[1]]
        if not sample.previous:
            return prompts.build(method, sample, self.setup)
        before = sample.previous, task[1]
        if before not in self.digests:
            raise NotApplicable("the turn before it is not drawn")
        name = f"attune-benchmark-{self.digests[before]}.png"
        return prompts.build(method, sample, self.setup, prompts.File(name, self.picture(before).read_bytes))

    def picture(self, task: tuple[str, str]) -> Path:
        sample, method = task
        return self.out / "pictures" / method / f"{sample}.png"

    def is_drawn(self, task: tuple[str, str]) -> bool:
        line = self.drawn.get(*task, self.digests[task])
        return line is not None and "failed" not in line and self.picture(task).exists()

    def groups(self) -> tuple[list, dict]:
        """The pictures still to be drawn: of each sample, and of the turns that follow it, together; and which picture
        must be there before which."""
        groups, after, first = {}, {}, {}
        for sample in self.samples.values():
            first[sample.key] = first.get(sample.previous, sample.key)
        for task in self.digests:
            if not self.is_drawn(task):
                groups.setdefault(first[task[0]], []).append(task)
                if self.samples[task[0]].previous:
                    after[task] = self.samples[task[0]].previous, task[1]
        return list(groups.values()), after

    def make(self, task: tuple[str, str]) -> servers.Job:
        prompt, previous = self.prompt(task), self.samples[task[0]].previous
        if previous and not self.is_drawn((previous, task[1])):
            raise host.PromptFailed("The turn before it was not drawn.")
        return servers.Job(prompt.nodes, prompt.result, {file.name: file.make() for file in prompt.files})

    def keep(self, task: tuple[str, str], server: str, kind: str, value: bytes | str, seconds: float) -> None:
        """The picture is whole before its line says that it is there."""
        line = {"sample": task[0], "method": task[1], "digest": self.digests[task]}
        if kind == servers.DRAWN:
            path = self.picture(task)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            with part.open("wb") as file:
                file.write(value)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        else:
            line["failed"] = value
            log.warning("%s, %s failed: %s", *task, value)
        self.drawn.add(line | {"server": server, "seconds": round(seconds, 2)})


# ---- the stages --------------------------------------------------------------------------------------------------


class Progress:
    """One line: how many pictures there are of how many, and what each server draws."""

    def __init__(self, run: Run, left: int):
        done = len(run.digests) - left
        slow = {} if sys.stderr.isatty() else {"mininterval": 60}
        self.bar = tqdm(total=len(run.digests), initial=done, desc="drawing", unit="picture", **slow)
        self.run, self.at_work = run, {}

    def begun(self, task, server):
        self.at_work[server] = " ".join(task)
        self.bar.set_postfix_str("; ".join(self.at_work.values()), refresh=sys.stderr.isatty())

    def done(self, task, server, *outcome):
        self.run.keep(task, server, *outcome)
        self.at_work.pop(server, None)
        self.bar.update()


@contextlib.contextmanager
def workers(urls: list[str], ray: str):
    """For each server one that draws on it; without a URL, on a ComfyUI that is started for this."""
    with contextlib.ExitStack() as stack:
        if not urls:
            log.info("Starting ComfyUI ...")
            urls = [stack.enter_context(host.Server(host.Host.current())).url]
        if ray:
            yield stack.enter_context(servers.on_ray(ray, urls)), urls
        else:
            yield [servers.Painter(url) for url in urls], urls


def draw(run: Run, urls: list[str], ray: str) -> None:
    """Draws what is missing, and notes the servers' ComfyUI and devices first: a run may be stopped at any time."""
    groups, after = run.groups()
    left = sum(map(len, groups))
    if not left:
        return
    with workers(urls, ray) as (crew, urls), logging_redirect_tqdm():
        (run.out / SERVERS).write_text(json.dumps(first_answer(urls), indent=1) + "\n", encoding="utf-8")
        progress = Progress(run, left)
        try:
            servers.Crew(groups, run.make, progress.done, progress.begun, after).work(crew)
        finally:
            progress.bar.close()


def first_answer(urls):
    for url in urls:
        with contextlib.suppress(OSError, ValueError):
            told = host.Client(url).get("/system_stats", timeout=30)
            devices = ", ".join(device["name"] for device in told["devices"])
            system = told["system"]
            return {
                "ComfyUI": system["comfyui_version"],
                "PyTorch": system["pytorch_version"],
                "device": devices,
                "servers": len(urls),
            }
    return {"servers": len(urls)}


def measure(run: Run, networks: Path | None) -> tuple[Lines, dict]:
    """Measures every picture that is there and was not measured, or lacks a figure that can be had now; and tells why
    some cannot be had."""
    metrics, measured = Metrics(networks), Lines(run.out / "measured.jsonl")
    names = [name for name in metrics.names if name not in metrics.why_not]
    for task in tqdm([task for task in run.digests if run.is_drawn(task)], desc="measuring", unit="picture"):
        digest = run.digests[task]
        line = measured.get(*task, digest)
        if line and set(names) <= set(line["metrics"]):
            continue
        sample, picture = run.source(run.samples[task[0]]), run.picture(task)
        if sample.picture is None:  # generated, and not yet there
            continue
        found = metrics.measure(sample, picture)
        shows = demo_success(sample, picture)
        line = {"sample": task[0], "method": task[1], "digest": digest}
        measured.add(line | {"metrics": {results.SUCCESS: None if shows is None else 100.0 * shows} | found})
    return measured, metrics.why_not


def measure_sets(run: Run, networks: Path | None) -> dict:
    """For each method what its pictures are together: name -> number or None."""
    metrics, pairs = Metrics(networks), {}
    for key, method in run.digests:
        if run.is_drawn((key, method)):
            pairs.setdefault(method, []).append((run.source(run.samples[key]).picture, run.picture((key, method))))
    return {method: figures for method, files in pairs.items() if (figures := metrics.measure_set(files))}


def gather(
    run: Run, measured: Lines, why_not: dict, about: dict, problems: list[str], sets: dict = MappingProxyType({})
) -> results.Results:
    drawn = [task for task in run.digests if run.is_drawn(task)]
    lines = {task: run.drawn.get(*task, digest) or {} for task, digest in run.digests.items()}
    figures = {task: measured.get(*task, run.digests[task]) for task in drawn}
    return results.Results(
        about=about,
        samples=[run.source(sample) for sample in run.samples.values()],
        methods=[told_settings(method, run.setup) for method in run.methods.values()],
        columns={results.SUCCESS: SHOWS, **{name: says for name, (_, says) in (COLUMNS | SETS).items()}},
        why_not=why_not,
        problems=[*problems, *run.problems],
        pictures={task: run.picture(task) for task in drawn},
        figures={task: line["metrics"] for task, line in figures.items() if line},
        failed={task: line["failed"] for task, line in lines.items() if "failed" in line},
        not_applicable=run.not_applicable,
        seconds={task: lines[task]["seconds"] for task in drawn if "seconds" in lines[task]},
        sets=sets,
    )


def told_settings(method: prompts.Method, setup: prompts.Setup) -> prompts.Method:
    """The method with a note that also says what it was given for the demo model, where that drew."""
    set_for = "" if setup.checkpoint else prompts.tuned(method)
    return replace(method, note=" ".join(part for part in (method.note, set_for) if part))


def show(found: results.Results, out: Path, page: bool) -> None:
    told = rating.about(found.samples, found.methods, found.pictures, out)
    (out / rating.ABOUT).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (out / "results.html").write_text(results.html(found, out), encoding="utf-8")
    for file in (out / "results.md", *([PAGE] if page else [])):
        sheet = file.with_suffix(".jpg")
        results.sheet(found).save(sheet, quality=85)
        file.write_text(results.markdown(found, sheet.name), encoding="utf-8")
    log.info("Look at %s", out / "results.html")


# ---- the command -------------------------------------------------------------------------------------------------


def read_changes(told: list[str]) -> dict:
    """{method: {input: value}} of arguments "method:title/input=value"; a value is read as JSON where it is that."""
    changes = {}
    for text in told:
        method, colon, rest = text.partition(":")
        place, equals, value = rest.partition("=")
        if not (colon and equals and "/" in place):
            raise ValueError(f'--set {text} is not "method:title of nodes/input=value".')
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        changes.setdefault(method, {})[place] = value
    return changes


def chosen(names: list[str]) -> list[prompts.Method]:
    methods = [prompts.read_method(name) for name in names or prompts.every_method()]
    return sorted(methods, key=lambda method: method.row)


def fitting(methods: list[prompts.Method], samples: list) -> list[prompts.Method]:
    """Without those on generated pictures where all are given, and those that invert where all are generated."""
    there = {sample.picture is None for sample in samples}
    return [method for method in methods if not samples or ("$source_seed" in method.inputs.values()) in there]


def version() -> str:
    return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]


def tell(args, setup: prompts.Setup) -> dict:
    """What there is to say about a run; what its servers are is known from when they last drew."""
    kept = args.out / SERVERS
    return {
        "data": args.data.partition(":")[0] + (f", {args.count} of each kind of edit" if args.count else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "Attune": version(),
        **(json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}),
        "model": setup.checkpoint or "the demo model",
        "settings": f"{setup.steps} steps, guidance {setup.guidance:g}, {setup.size} x {setup.size}",
        "seed": setup.seed,
        "command": args.again,
    }


def again(args, parser) -> str:
    """The command that draws the same pictures, wherever that is."""
    words = ["python3", "dev.py", "bench", "run"]
    for name in ("data", "count", "methods", "seed", "checkpoint", "size", "steps", "guidance"):
        if (value := getattr(args, name)) != parser.get_default(name):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    for change in args.changes:
        words += ["--set", change]
    return shlex.join(words)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=DEMO, help="demo (default), or one of the formats of datasets.py with its folder"
    )
    parser.add_argument(
        "--count", type=int, default=0, help="the first samples of each kind of edit; 0 (default) is all"
    )
    parser.add_argument(
        "--methods", nargs="+", default=[], help="names or JSON files; all of benchmark/methods by default"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--servers", nargs="+", default=[], metavar="URL", help="by default one is started for this run"
    )
    parser.add_argument("--ray", default="", metavar="ADDRESS", help='of a Ray cluster, or "local"')
    parser.add_argument("--out", type=Path, default=OUT, help=f"by default {OUT.relative_to(ROOT)}")
    parser.add_argument("--networks", type=Path, help="a folder of the networks that metrics need, by their names")
    parser.add_argument("--checkpoint", default="", metavar="NAME", help="on the servers; by default the demo model")
    parser.add_argument("--size", type=int, help="of the pictures: by default 128, or 512 with --checkpoint")
    parser.add_argument("--steps", type=int, help="by default 20, or 50 with --checkpoint")
    parser.add_argument("--guidance", type=float, help="by default 3, or 7.5 with --checkpoint")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="METHOD:TITLE/INPUT=VALUE")
    parser.add_argument("--page", action="store_true", help="write benchmark/RESULTS.md, too")
    args = parser.parse_args(argv)
    args.out, args.again = args.out.resolve(), again(args, parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    try:
        run_all(args)
    except (host.HostError, ValueError) as error:
        raise SystemExit(str(error)) from None


def run_all(args):
    if args.checkpoint and not args.servers:
        raise ValueError(
            "--checkpoint needs --servers: a ComfyUI started for this run has no checkpoint but the demo's."
        )
    if args.page and args.data != DEMO:
        raise ValueError("--page is for the demo world; leave --data out.")
    usual = {"size": 512, "steps": 50, "guidance": 7.5} if args.checkpoint else {}
    usual |= {name: value for name in ("size", "steps", "guidance") if (value := getattr(args, name)) is not None}
    setup = prompts.Setup(args.checkpoint, seed=args.seed, changes=read_changes(args.changes), **usual)
    out, methods = args.out, chosen(args.methods)
    if strange := set(setup.changes) - {"*"} - {method.key for method in methods}:
        raise ValueError(f"--set speaks of {', '.join(strange)}, which is none of the methods; * is all of them.")
    samples, problems = datasets.read(args.data, out / "samples", args.count, args.seed)
    methods = methods if args.methods else fitting(methods, samples)
    if any(sample.picture is None for sample in samples) and SOURCE not in {method.key for method in methods}:
        methods = sorted([*methods, prompts.read_method(SOURCE)], key=lambda method: method.row)
    run = Run(out, samples, methods, setup)
    for problem in (*problems, *run.problems):
        log.warning("%s", problem)
    if not run.samples:
        raise ValueError(f"There is no sample to edit in {args.data}.")
    draw(run, args.servers, args.ray)
    measured, why_not = measure(run, args.networks)
    sets = measure_sets(run, args.networks)
    show(gather(run, measured, why_not, tell(args, setup), problems, sets), out, args.page)


if __name__ == "__main__":
    main()
