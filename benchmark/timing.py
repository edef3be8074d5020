"""What edits, inversions and files take in time and memory, beside stock sampling and plain implementations.

    dev.py bench time                    everything, at both sizes
    dev.py bench time --size demo        the demo model
    dev.py bench time --size full        SD 1.5's UNet with random weights: 256 px in fp32, on a GPU 512 px in fp16
    dev.py bench time --part PART

    edits       a sampling with each edit, beside stock sampling and the papers' procedures on diffusers
    memory      the same at latents of 64x64, once each: the most bytes that tensors held
    learning    inversion, null-text and dynamic prompts, beside straightforward ones
    files       saving and loading a trajectory, beside inverting it
    where       where the time of a sampling goes
    overhead    what an edit's nodes and sampling take outside the UNet
    compile     an edit on a compiled MODEL
    batch       eight pictures in one graph beside one

All that is compared runs in one process, turn and turn about; a ratio is the median of the turns' ratios. Machines do
other things too, so on a CPU the targets go by the processor's clock, on a GPU by the wall's: "best clock" in the
tables. Seconds say nothing but of one machine. Edits'
windows span the whole sampling, which is the dearest they can be. The figures are kept in benchmark/timing.json, part
by part, and benchmark/TIMING.md is written from them.
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import platform
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from unittest import mock

import comfy.model_management as management
import comfy.utils
import comfyui_version
import diffusers
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from ..attention_patches import host as patches
from ..demo.measure import Bench, call
from ..inversion import disk, file, host
from ..inversion.dynamic_prompt import DynamicPrompt
from ..inversion.null_text import NullText
from ..nodes import edit, fusion, invert
from . import cost, dynamic_prompt, editing_parity, inversion, reference, self_parity, to_diffusers
from .cost import GUIDANCE, LONGER, SOURCE, STOCK, TARGET, half

RESULTS = Path(__file__).parent / "timing.json"
PAGE = RESULTS.with_name("TIMING.md")
PLAIN = "plain "  # before the name of what the papers' procedure on diffusers does
WALL, BUSY = 1, 2  # the clocks, as cost.time_of gives them
log = logging.getLogger("attune.bench")


# ---- sizes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """``make(steps, side)`` is a :class:`cost.Subject`; what follows are how much each part does."""

    make: object
    side: int
    steps: int
    repeats: int
    updates: int  # of null-text
    graph: int  # steps where whole graphs are looked at
    eight: int  # steps with eight pictures


def demo_size(steps, side):
    it = cost.demo_size(steps)
    return cost.subject(it.model, it.clip, side, steps)


def full_size(steps, side):
    return cost.full_size(steps, side, torch.float16 if torch.cuda.is_available() else torch.float32)


SIZES = {
    "demo": Size(demo_size, 16, 10, 7, 10, 20, 4),
    "full": Size(full_size, 64 if torch.cuda.is_available() else 32, 1, 3, 4, 4, 1),
}


def made(make, *args):
    """What gradients are to flow through cannot be made in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return make(*args)


def clock():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- what is compared --------------------------------------------------------------------------------------------


def mix_texts(it):
    positive, negative = call(edit.AttuneEmbeddingControl, it.clip, it.trajectory, SOURCE, TARGET)
    return it.model, positive, negative


def fuse(it):
    """Its source, its intermediate and both halves of guidance: eight rows a step."""
    intermediate = replace(it.trajectory, conditioning=it.text(TARGET), negative=it.text(""))
    settings = half(), 0.0, 1.0, 0, it.text(SOURCE)
    return call(fusion.AttuneMaskedFusion, it.model, it.trajectory, intermediate, *settings)[:3]


EDITS = cost.EDITS | {"embedding control": mix_texts, "masked fusion": fuse}
WHOLE = (0.0, 1.0)
SWAPPED = editing_parity.Case(SOURCE, TARGET, cross=WHOLE, self_=WHOLE)
OFTEN = ("start", 0.0), ("end", 1.0)
READ = OFTEN + (("layer", 0),)
CASES = {
    "swap": SWAPPED,
    "refine": replace(SWAPPED, target=LONGER, kind=editing_parity.REFINE),
    "swap and re-weight": replace(SWAPPED, weights=(("yellow", 2.0),)),
    "swap and local blend": replace(SWAPPED, inside=("circle",), outside=("square",)),
    "free prompt editing": self_parity.Case(self_parity.FPE, TARGET, (*OFTEN, ("token_limit", 1 << 20))),
    "mutual self-attention": self_parity.Case(self_parity.MUTUAL, TARGET, READ),
    "mutual, masked": self_parity.Case(
        self_parity.MUTUAL, TARGET, (*READ, ("source_mask", half()[0]), ("target_mask", half()[0]))
    ),
}


class _Papers:
    """The papers' side alone, on a subject's own weights; nothing that is drawn is kept."""

    def __init__(self, it, network):
        self.bench, self.network = it, network
        self.empty = [[it.text("")[0][0].to(network.device, network.dtype), {}]]
        self.read = functools.cache(super().prompt)

    def prompt(self, text):
        read = self.read(text)
        return replace(read, embedding=read.embedding.to(self.network.device, self.network.dtype))

    def draw(self, case, trajectory):
        for text in (case.source, case.target):
            self.read(text)  # by the host, where the host computes
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.network.dtype)
        try:
            with self.network.device:  # the papers' procedures are written for fp32 on the CPU
                return self.theirs(case, trajectory)
        finally:
            torch.set_default_dtype(before)


class _Words(_Papers, editing_parity.Sides):
    pass


class _Selves(_Papers, self_parity.Sides):
    pass


def plain_network(it, dtype=None):
    """The subject's UNet in diffusers' layout, with the same tensors, or in another precision."""
    weights = it.unet.state_dict()
    config = to_diffusers._config(weights)
    heads = it.unet.middle_block[1].transformer_blocks[0].attn1.heads
    if heads * to_diffusers.HEAD_WIDTH != config["block_out_channels"][-1]:
        config["attention_head_dim"] = heads  # as many at each level
    named = {to_diffusers.PREFIX + name: t.to(it.model.load_device, dtype) for name, t in weights.items()}
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    network.load_state_dict(convert_ldm_unet_checkpoint(named, config), assign=True)
    return network.eval().requires_grad_(False)


def plain_runs(it, network):
    """Name -> (network, what draws it)."""
    place, run = network.device, it.trajectory
    run = replace(run, sigmas=run.sigmas.to(place, network.dtype), latents=run.latents.to(place, network.dtype))
    words, selves, runs = _Words(it, network), _Selves(it, network), {}
    for name, case in CASES.items():
        side = words if isinstance(case, editing_parity.Case) else selves
        if side is selves:
            given = ((key, value.to(place) if torch.is_tensor(value) else value) for key, value in case.changed)
            case = replace(case, changed=tuple(given))
        runs[PLAIN + name] = network, functools.partial(side.draw, case, run)
    return runs


def our_runs(it, edits=EDITS):
    ways = cost.ways(it, edits)
    del ways["guidance 1"]
    return {name: (it.unet, functools.partial(it.sample, *way)) for name, way in ways.items()}


# ---- the parts ---------------------------------------------------------------------------------------------------


def figures(seen, steps, base):
    """Name -> rows a step, and how it stands to ``base`` by row and as a whole, by either clock."""
    return {
        name: {
            "rows a step": round(turns[0][0] / steps, 2),
            "a row, wall's clock": cost.over(seen, name, base, WALL, by_row=True),
            "a row, best clock": cost.over(seen, name, base, best_clock(), by_row=True),
            "in all, wall's clock": cost.over(seen, name, base, WALL),
            "in all, best clock": cost.over(seen, name, base, best_clock()),
            "seconds": statistics.median(turn[WALL] for turn in turns),
        }
        for name, turns in seen.items()
    }


def against(found, seen, ours, other, what="plain"):
    found[ours][f"times faster than {what}"] = cost.over(seen, other, ours, best_clock())


def edits(size, repeats, only=EDITS):
    it = made(size.make, size.steps, size.side)
    chosen = {name: make for name, make in EDITS.items() if name in only}
    plain = plain_runs(it, made(plain_network, it))
    runs = our_runs(it, chosen) | {n: run for n, run in plain.items() if n.removeprefix(PLAIN) in chosen}
    seen, peaks = cost.turns(runs, repeats)
    found = figures(seen, it.steps, STOCK)
    for name in chosen:
        if PLAIN + name in seen:
            against(found, seen, name, PLAIN + name)
    extra(found, peaks)
    return found


def best_clock():
    """The processor's where it does all the work: other programs disturb it least."""
    return WALL if torch.cuda.is_available() else BUSY


def extra(found, peaks):
    """Adds the most bytes that tensors held, what an edit holds more than stock sampling, and that beside the plain
    implementation's."""
    for name, most in peaks.items():
        row = found.setdefault(name, {})
        row["peak MB"] = most / 1e6
        row["MB over stock"] = (most - peaks[STOCK]) / 1e6
        if PLAIN + name in peaks:
            row["of plain's MB over stock"] = (most - peaks[STOCK]) / (peaks[PLAIN + name] - peaks[STOCK])


def memory(size, repeats, only=CASES):
    """One step of those that have a plain implementation. The plain ones compute nothing but shapes, which tells the
    same bytes; those that look at a mask's values cannot, and are left out."""
    it = made(size.make, 1, 64)
    peaks = {
        name: cost.peak(run)
        for name, (_, run) in our_runs(it, {name: EDITS[name] for name in CASES if name in only}).items()
    }
    for name, (_, run) in plain_runs(it, made(plain_network, it).to("meta")).items():
        if name.removeprefix(PLAIN) in peaks and name.removeprefix(PLAIN) not in BY_VALUES:
            peaks[name] = cost.peak(run)
    found = {}
    extra(found, peaks)
    return found


BY_VALUES = ("swap and local blend", "mutual, masked")


FEW = 2  # steps where embeddings are learned
HALF_UPDATES = ", half the updates at twice the rate"
HOSTS = "straightforward null-text"
PAPERS = "dynamic prompts, as the authors' code"


def learning(size, repeats):
    """Few steps, since each costs the same. Peak memory is of the run as a whole."""
    it = made(size.make, min(size.steps, FEW), size.side)
    network, text, empty = made(plain_network, it, torch.float32), it.text(SOURCE), it.text("")
    settings = NullText(it.guidance, inner=size.updates)
    latent = {"samples": host.to_host_scale(it.model, it.trajectory.latents[-1])}
    grid, level = host.HOST_GRID, inversion.ddim.LATER
    inverted = call(invert.AttuneDDIMInversion, it.model, latent, text, it.steps, grid, level)[0]
    with torch.inference_mode(False):
        scaled = inverted.latents / (1 + inverted.sigmas**2).sqrt().view(-1, 1, 1, 1, 1)
        path = [z.clone().to(network.device) for z in scaled]
        cond, null = (one[0][0].clone().float().to(network.device) for one in (text, empty))

    def learn(inner, rate):
        call(invert.AttuneNullTextInversion, inverted, it.model, empty, it.guidance, inner, rate, settings.tolerance,
             settings.warm)  # fmt: skip

    def learn_plainly():
        with torch.inference_mode(False), torch.enable_grad():
            reference.null_text(
                network, inversion.GRIDS[grid], path, cond, null, it.guidance, settings.inner, straightforward=True
            )

    def invert_plainly():
        reference.ddim_invert(network, inversion.GRIDS[grid], path[-1], cond, it.steps, inversion.LEVELS[level])

    runs = {
        STOCK: our_runs(it, {})[STOCK],
        "DDIM inversion": (
            it.unet,
            lambda: call(invert.AttuneDDIMInversion, it.model, latent, text, it.steps, grid, level),
        ),
        PLAIN + "DDIM inversion": (network, invert_plainly),
        "null-text": (it.unet, functools.partial(learn, settings.inner, settings.rate)),
        "null-text" + HALF_UPDATES: (it.unet, functools.partial(learn, settings.inner // 2, settings.rate * 2)),
        PLAIN + "null-text": (network, learn_plainly),
    }
    if network.device.type == "cpu":
        runs[HOSTS] = it.unet, lambda: inversion._slow(it, inverted, text, empty, settings)
    seen, peaks = cost.turns(runs, repeats)
    found = figures(seen, it.steps, STOCK)
    for name in ("DDIM inversion", "null-text"):
        against(found, seen, name, PLAIN + name)
    against(found, seen, "null-text" + HALF_UPDATES, PLAIN + "null-text")
    for name in ("null-text", "null-text" + HALF_UPDATES):
        if HOSTS in seen:
            against(found, seen, name, HOSTS, "straightforward")
    for name, most in peaks.items():
        found[name]["peak MB"] = most / 1e6
    return found


def words(size, repeats, steps=FEW):
    """Dynamic prompts, for one of their benchmark's scenes, by the settings of that benchmark."""
    bench = made(Bench, 1, 0, steps, GUIDANCE)
    (batch,) = dynamic_prompt.batches(bench, 1, 0, dynamic_prompt.SPEED, 1)
    papers, few = DynamicPrompt(rate=0.01, inner=21), DynamicPrompt(rate=0.01, inner=5)
    ways = {
        PAPERS: (papers, NullText(GUIDANCE, 51, 0.01, -1.0, False)),
        "dynamic prompts, 21 looks, 10 null updates": (papers, NullText(GUIDANCE)),
        "dynamic prompts, 5 looks, 10 null updates": (few, NullText(GUIDANCE)),
        "dynamic prompts, 5 looks, 5 null updates at twice the rate": (few, NullText(GUIDANCE, 5, 0.02)),
    }
    unet = bench.model.model.diffusion_model
    runs = {n: (unet, functools.partial(dynamic_prompt.learn, bench, batch, *way)) for n, way in ways.items()}
    seen, peaks = cost.turns(runs, repeats)
    found = figures(seen, steps, PAPERS)
    for name, most in peaks.items():
        against(found, seen, name, PAPERS, "straightforward")
        found[name]["peak MB"] = most / 1e6
    return found


def saved(trajectory, path):
    disk.write_over(path, file.packed(trajectory, host.versions()))


def files(size, repeats, steps=50):
    """A run of 50 steps with null embeddings; inverting is scaled to as many steps."""
    it = made(size.make, size.steps, size.side)
    long = cost.subject(it.model, it.clip, size.side, steps).trajectory
    long = replace(long, header=long.header | {"method": "DDIM"})
    text, empty = it.text(SOURCE), it.text("")
    nulls = torch.randn(long.steps, 1, *empty[0][0].shape[1:], generator=torch.Generator().manual_seed(0))
    windows = host.windows(it.model, long.sigmas)
    kept = {
        "without embeddings": replace(long, conditioning=text),
        "with null embeddings": replace(long, conditioning=text, negative=empty, nulls=nulls, windows=windows),
    }
    latent = {"samples": host.to_host_scale(it.model, long.latents[-1])}
    how = it.steps, host.HOST_GRID, inversion.ddim.LATER
    runs = {"inverting": (it.unet, lambda: call(invert.AttuneDDIMInversion, it.model, latent, text, *how))}
    folder = Path(tempfile.mkdtemp())
    try:
        for name, trajectory in kept.items():
            path = folder / name
            runs[f"saving, {name}"] = it.unet, functools.partial(saved, trajectory, path)
            runs[f"loading, {name}"] = it.unet, functools.partial(file.load, path)
        (seen, _), found = cost.turns(runs, repeats), {}
        for name, turns in seen.items():
            if name == "inverting":
                continue
            size_ = (folder / name.split(", ")[1]).stat().st_size / 1e6
            share = cost.over(seen, name, "inverting", WALL) * it.steps / long.steps
            seconds = statistics.median(turn[WALL] for turn in turns)
            found[name] = {"MB": size_, "milliseconds a MB": 1000 * seconds / size_, "% of inverting": 100 * share}
    finally:
        shutil.rmtree(folder)
    return found


# ---- where time goes ---------------------------------------------------------------------------------------------

UNET, KERNEL, MAPS = "the UNet's other layers", "attention, the host's kernel", "cross-attention maps, fp32"
RULES, ROWS = "controllers", "reading and picking rows"
OURS, HOST = "this pack's wrappers", "the host's sampling"
KINDS = UNET, KERNEL, MAPS, RULES, ROWS, OURS, HOST
RULE_METHODS = ("self_attention", "self_output", "cross_map", "cross_output")


class Shares:
    """Seconds by what was running; what runs inside of something else counts there alone."""

    def __init__(self):
        self.seconds, self._stack, self._since = Counter(), [], 0.0

    @contextlib.contextmanager
    def span(self, name):
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def _charge(self):
        now = clock()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def timed(self, name, function):
        def run(*args, **kwargs):
            with self.span(name):
                return function(*args, **kwargs)

        return run

    def wrapper(self, function):
        """One of the pack's wrappers; what it hands on to is the host's."""

        def run(executor, *args, **kwargs):
            with self.span(OURS):
                return function(_Handed(executor, self), *args, **kwargs)

        return run

    @contextlib.contextmanager
    def watching(self, unet):
        """In its `with`, edits that are made and sampled there are looked at."""
        with contextlib.ExitStack() as stack:

            def put(owner, name, replacement):
                stack.enter_context(mock.patch.object(owner, name, replacement))

            put(unet, "forward", self.timed(UNET, unet.forward))
            put(patches._EditPatch, "__call__", self.method(ROWS, patches._EditPatch.__call__))
            put(patches, "_kernel", self.timed(KERNEL, patches._kernel))
            for name in ("attention_map", "apply_map"):
                put(patches, name, self.timed(MAPS, getattr(patches, name)))
            for name in ("_outer_sample", "_predict_noise", "_calc_cond_batch", "_apply_model"):
                put(patches, name, self.wrapper(getattr(patches, name)))
            for kind, name in itertools.product(_subclasses(patches.Controller), RULE_METHODS):
                if name in vars(kind):
                    put(kind, name, self.method(RULES, vars(kind)[name]))
            yield self

    def method(self, name, function):
        def run(this, *args, **kwargs):
            with self.span(name):
                return function(this, *args, **kwargs)

        return run


class _Handed:
    def __init__(self, executor, shares):
        self._executor, self._shares = executor, shares

    def __getattr__(self, name):
        return getattr(self._executor, name)

    def __call__(self, *args, **kwargs):
        with self._shares.span(HOST):
            return self._executor(*args, **kwargs)


def _subclasses(kind):
    return {kind, *(c for one in kind.__subclasses__() for c in _subclasses(one))}


def where(size, repeats, only=EDITS):
    """Shares of a sampling in %, and how much of the UNet's rows are references'; the mean of the turns."""
    it, found = made(size.make, size.steps, size.side), {}
    for name in (STOCK, *(n for n in EDITS if n in only)):
        shares = Shares()
        with shares.watching(it.unet):
            way = cost.ways(it, {name: EDITS[name]} if name in EDITS else {})[name]
            it.sample(*way)  # thrown away
            shares.seconds.clear()
            for _ in range(repeats):
                with shares.span(HOST):
                    rows = cost.time_of(it.unet, functools.partial(it.sample, *way))[0]
        total = sum(shares.seconds.values())
        found[name] = {f"{key} %": 100 * shares.seconds[key] / total for key in KINDS}
        found[name]["reference rows %"] = 100 * reference_rows(way[0]) / (rows / it.steps)
        log.info("%s", name)
    return found


def reference_rows(model):
    spec = model.model_options["transformer_options"].get(patches.KEY)
    return len(spec.references) if spec else 0


def overhead(size, repeats):
    """A graph's nodes from the prompts to the latent: what of their time is not the UNet's, the median of the turns."""
    it, seen = made(size.make, size.graph, size.side), {}

    def swap():
        return cost.swap(it)

    def plain():
        return it.model, it.text(TARGET)

    for turn in range(repeats + 1):
        for name, make in ((STOCK, plain), ("swap", swap)):
            shares = Shares()
            with shares.watching(it.unet):
                begun = clock()
                way = make()
                nodes = clock() - begun
                with mock.patch.object(it.unet, "forward", total := Total(it.unet.forward)):
                    it.sample(*way)
                whole = clock() - begun
            if turn:  # the first is thrown away: whatever happens only once
                seen.setdefault(name, []).append((whole - total.seconds, nodes, shares.seconds[OURS], whole))
    steps = it.steps
    keys = "outside the UNet %", "of it the nodes before the sampler %", "of it this pack's wrappers %"
    found = {
        name: {key: 100 * statistics.median(turn[i] / turn[3] for turn in turns) for i, key in enumerate(keys)}
        for name, turns in seen.items()
    }
    for row in found.values():
        row["steps"] = steps
    return found


class Total:
    """A function that adds up its seconds."""

    def __init__(self, function):
        self._function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        begun = clock()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.seconds += clock() - begun


# ---- compiled, and eight at once ---------------------------------------------------------------------------------

COMPILED = ("swap", "free prompt editing", "mutual, masked", "context preserving", "masked fusion")


def compiling(model):
    model = model.clone()
    set_torch_compile_wrapper(model, backend="inductor" if torch.cuda.is_available() else "eager")
    return model


def compiled(size, repeats, only=COMPILED):
    """A compiled MODEL, as the host's TorchCompileModel makes it, before the edit's node and behind it: how far its
    latent lies from the plain one's, beside what the edit changes, and whether the network ran compiled at all.

    Where there is no GPU the compiler only traces and runs what it traced: writing the code takes half an hour there.
    """
    it, found = made(size.make, size.eight, size.side), {}
    plain = it.sample(*cost.ways(it, {})[STOCK])["samples"]
    for name in only:
        make = EDITS[name]
        model, positive, *negative = make(it)
        edited = it.sample(model, positive, GUIDANCE, *negative)["samples"]
        before = replace(it, model=compiling(it.model))
        behind = compiling(model), positive, *negative
        for order, way in (("before the edit", make(before)), ("behind the edit", behind)):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model, positive, *negative = way
            run = functools.partial(it.sample, model, positive, GUIDANCE, *negative)
            latent = run()["samples"]
            found[f"{name}, {order}"] = {
                "apart": inversion.relative(latent, edited),
                "the edit": inversion.relative(edited, plain),
                "compiled graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            }
            log.info("%s, %s: %s", name, order, found[f"{name}, {order}"])
    return found


def batch(size, repeats, only=EDITS):
    """Eight pictures, each with its own source, beside one: seconds a picture, the median of the turns' ratios."""
    one = made(size.make, size.eight, size.side)
    eight = one.beside(8)
    chosen = {name: make for name, make in EDITS.items() if name in only}
    alone, many = our_runs(one, chosen), our_runs(eight, chosen)
    runs = {key: run for name in alone for key, run in ((name, alone[name]), (name + EIGHT, many[name]))}
    seen, _ = cost.turns(runs, repeats)
    return {
        name: {
            "rows a step": seen[name + EIGHT][0][0] / one.steps,
            "a picture of eight, wall's clock": cost.over(seen, name + EIGHT, name, WALL) / 8,
            "a picture of eight, best clock": cost.over(seen, name + EIGHT, name, best_clock()) / 8,
        }
        for name in alone
    }


EIGHT = ", eight pictures"


# ---- targets -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure of a part that must be at most, or at least, so much. ``key`` is its column, or a function of a row."""

    name: str
    part: str
    key: object
    most: float = float("inf")
    least: float = float("-inf")

    def measured(self, row):
        return self.key(row) if callable(self.key) else row.get(self.key)

    @property
    def wanted(self):
        return f"at most {self.most:g}" if self.most < float("inf") else f"at least {self.least:g}"


def apart(row):
    return row["apart"] / row["the edit"]


FASTER = "times faster than straightforward"
TARGETS = (
    Target("an edit's row over stock's", "edits", "a row, best clock", most=1.10),
    Target("times faster than plain", "edits", "times faster than plain", least=1.3),
    Target("memory over stock's, of plain's", "memory", "of plain's MB over stock", most=0.5),
    Target(FASTER, "learning", FASTER, least=3),
    Target(FASTER, "dynamic prompts", FASTER, least=3),
    Target("outside the UNet, %", "overhead", "outside the UNet %", most=3),
    Target("compiled: apart, of what the edit changes", "compile", apart, most=0.02),
    Target("a picture of eight over one alone", "batch", "a picture of eight, best clock", most=1.05),
)


def targets(known):
    """(target, size, of what, measured, wanted, whether it holds) for all that was measured: the pack's, not what it is
    compared with."""
    out = []
    for target, size in itertools.product(TARGETS, known):
        for name, row in known[size].get(target.part, {"found": {}})["found"].items():
            value = target.measured(row)
            if value is not None and name not in (STOCK, PAPERS) and not name.startswith(PLAIN):
                holds = target.least <= value <= target.most
                out.append((target.name, size, name, value, target.wanted, holds))
    return out


# ---- the command -------------------------------------------------------------------------------------------------

PARTS = {
    "edits": edits,
    "memory": memory,
    "learning": learning,
    "dynamic prompts": words,
    "files": files,
    "where": where,
    "overhead": overhead,
    "compile": compiled,
    "batch": batch,
}
DEMO_ONLY = ("dynamic prompts", "compile")
OF_EDITS = ("edits", "memory", "where", "compile", "batch")
ONCE = {"memory": 1, "compile": 1}  # turns of parts that take no times


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def kept():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(size, part, settings, found):
    """Puts a part's figures among those that are there, and writes the page anew."""
    known = kept()
    known.setdefault(size, {})[part] = {"settings": settings, "found": rounded(found)}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    PAGE.write_text(page(known))


def page(known):
    """All figures as Markdown."""
    how = " ".join(__doc__.split("\n\n")[-1].split())
    text = ["# Time and memory", "", f"Written by `python3 dev.py bench time`. {how}", "", "## Targets", ""]
    text += ["| target | size | of what | measured | wanted | holds |", "|---|---|---|---|---|---|"]
    text += [
        f"| {target} | {size} | {what} | {value:.3g} | {wanted} | {'yes' if holds else '**no**'} |"
        for target, size, what, value, wanted, holds in targets(known)
    ]
    for size, parts in known.items():
        for name, part in parts.items():
            settings = ", ".join(f"{key} {value}" for key, value in part["settings"].items())
            text += ["", f"## {name.capitalize()}, {size} size", "", f"{settings}.", "", cost.table(part["found"])]
    return "\n".join(text) + "\n"


def settings_of(size, name, repeats):
    device = management.get_torch_device().type
    precision = "fp16" if size == "full" and device == "cuda" else "fp32"
    one = SIZES[size]
    steps = {"overhead": one.graph, "batch": one.eight, "compile": one.eight, "memory": 1}
    steps |= {"learning": min(one.steps, FEW), "dynamic prompts": FEW}
    side = 64 if name == "memory" else one.side
    return {
        "date": date.today().isoformat(),
        "latents": f"{side}x{side}",
        "steps": steps.get(name, one.steps),
        "turns": repeats,
        "guidance": GUIDANCE,
        **({"updates a step": one.updates} if name == "learning" else {}),
        "device": device,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "ComfyUI": comfyui_version.__version__,
        "Python": platform.python_version(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SIZES, "all"), default="all")
    parser.add_argument("--part", choices=(*PARTS, "all"), nargs="+", default=["all"])
    parser.add_argument("--repeats", type=int, help="turns: 7 at the demo size, 3 at the full one")
    parser.add_argument("--edits", choices=tuple(EDITS), nargs="+", help="only these, in the parts that run edits")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    for name, size in SIZES.items():
        for part, measure in PARTS.items():
            chosen = args.size in (name, "all") and ("all" in args.part or part in args.part)
            if not chosen or (name == "full" and part in DEMO_ONLY):
                continue
            repeats = ONCE.get(part, args.repeats or size.repeats)
            log.info("%s, %s size", part, name)
            chosen = {"only": args.edits} if args.edits and part in OF_EDITS else {}
            with torch.inference_mode():
                found = measure(size, repeats, **chosen)
            settings = settings_of(name, part, repeats)
            log.info("\n%s\n", cost.table(rounded(found)))
            keep(name, part, settings, found)
    log.info("%s", page(kept()))


if __name__ == "__main__":
    main()
