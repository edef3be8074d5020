"""What an edit costs beside stock sampling: UNet rows a step, time for each row, memory.

    --size demo     the demo model at its own size
    --size full     SD 1.5's UNet with random weights, for pictures of 256 px

    --part edits    whole samplings, edit by edit
    --part kernel   one layer: attention with the source's maps beside the host's own attention, on the same q, k, v

Every edit's windows span the whole sampling, which is the dearest it can be. Time is compared within one run, turn and
turn about; a row is one picture through the UNet under one text, and stock sampling takes two of them a step. The
figures are printed, and kept in benchmark/editing.json.
"""

import argparse
import functools
import json
import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import comfy_extras.nodes_custom_sampler as custom
import torch

import nodes as stock

from ..attention_patches import host as patches
from ..demo.measure import call
from ..demo.model import UNET, _initialise
from ..inversion import host
from ..inversion.trajectory import Trajectory
from ..nodes import cache, demo, edit, self_attention
from .live import LiveBytes

RESULTS = Path(__file__).parent / "editing.json"
SOURCE = "a red circle and a blue square on a gray background"
TARGET = "a yellow circle and a blue square on a gray background"
LONGER = "a red striped circle and a blue square on a gray background"
# What SD 1.5's UNet has other than the demo model's.
FULL = {
    "model_channels": 320,
    "channel_mult": (1, 2, 4, 4),
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": 768,
}
STOCK, APART = "stock sampling", "the same rows with no edit"
ALWAYS = (0.0, 1.0, 0.0, 1.0, 1024)
GUIDANCE = 7.5
log = logging.getLogger("attune.bench")


# ---- what is sampled ---------------------------------------------------------------------------------------------


class Widened:
    """A CLIP whose embeddings are carried to another width at random: for networks that were never trained."""

    def __init__(self, clip, width):
        self._clip, self._width = clip, width

    def __getattr__(self, name):
        return getattr(self._clip, name)

    def encode_from_tokens_scheduled(self, *args, **kwargs):
        encoded = self._clip.encode_from_tokens_scheduled(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        carry = torch.randn(encoded[0][0].shape[-1], self._width, generator=generator) / 16
        return [[text @ carry.to(text), extras] for text, extras in encoded]


@dataclass(frozen=True)
class Subject:
    """A model and a run of it that an edit can read. The run need not make a picture: only its cost is looked at."""

    model: object
    clip: object
    trajectory: Trajectory
    noise: dict
    guidance: float = GUIDANCE

    def text(self, prompt):
        return call(stock.CLIPTextEncode, self.clip, prompt)[0]

    def sample(self, model, positive, guidance=GUIDANCE, negative=None):
        euler, negative = call(custom.KSamplerSelect, "euler")[0], negative or self.text("")
        arguments = False, 0, guidance, positive, negative, euler, self.trajectory.sigmas, self.noise
        return call(custom.SamplerCustom, model, *arguments)[0]

    @property
    def unet(self):
        return self.model.model.diffusion_model

    @property
    def steps(self):
        return self.trajectory.steps

    def beside(self, pictures=1):
        """The same with another run, of so many pictures."""
        return subject(self.model, self.clip, self.noise["samples"].shape[-1], self.steps, pictures)


def subject(model, clip, side, steps, pictures=1):
    sigmas = host.schedule(model, steps, host.HOST_GRID)
    generator = torch.Generator().manual_seed(0)
    noise, picture = torch.randn(2, pictures, 4, side, side, generator=generator)
    path = torch.stack([picture + s * noise for s in sigmas])
    trajectory = Trajectory(sigmas, path, len(sigmas) - 1, host.describe_model(model) | {"prompt": SOURCE})
    return Subject(model, clip, trajectory, {"samples": host.to_host_scale(model, trajectory.noise)})


def demo_size(steps):
    model, clip, _ = call(demo.AttuneDemoCheckpoint)
    return subject(model, clip, 16, steps)


def random_model(config, dtype=torch.float32):
    """A MODEL of SD 1.5's kind with a UNet of this configuration and random weights, on the host's device."""
    family = comfy.supported_models.SD15({})
    family.unet_config = config
    family.set_inference_dtype(dtype, None)
    torch.manual_seed(0)
    offload = management.unet_offload_device()
    model = family.get_model({"some": torch.zeros(1)}, device=offload)
    model.diffusion_model.apply(_initialise)
    # A random network is no denoiser; a small last layer keeps its runs tame.
    torch.nn.init.normal_(model.diffusion_model.out[2].weight, std=0.01)
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), offload)


def full_size(steps, side=32, dtype=torch.float32):
    """SD 1.5's UNet with random weights."""
    clip = Widened(call(demo.AttuneDemoCheckpoint)[1], FULL["context_dim"])
    return subject(random_model(UNET | FULL, dtype), clip, side, steps)


# ---- the edits, at their dearest ---------------------------------------------------------------------------------


def swap(it, model=None):
    return call(edit.AttunePromptSwap, model or it.model, it.clip, it.trajectory, SOURCE, TARGET, *ALWAYS)


def swap_again(it):
    """What the edit costs once the cache holds what it reads; the first turn, which fills it, is thrown away."""
    return swap(it, *call(cache.AttuneFeatureCache, it.model, 8000))


def refine(it):
    return call(edit.AttunePromptRefine, it.model, it.clip, it.trajectory, SOURCE, LONGER, *ALWAYS)


def swap_and_reweight(it):
    model, _ = swap(it)
    return call(edit.AttunePromptReweight, model, it.clip, it.trajectory, TARGET, "yellow: 2", *ALWAYS)


def swap_and_blend(it):
    model, _ = swap(it)
    words = SOURCE, TARGET, "circle", "square", 0.3, 0.0, 256
    return call(edit.AttuneLocalBlend, model, it.clip, it.trajectory, *words)


def read_maps(it):
    settings = {"source_prompt": "", "target_prompt": TARGET, "start": 0.0, "end": 1.0, "token_limit": 1 << 20}
    return call(self_attention.AttuneFreePromptEditing, it.model, it.clip, it.trajectory, **settings)


def read_values(it, **masks):
    settings = {"source_prompt": "", "target_prompt": TARGET, "start": 0.0, "end": 1.0, "layer": 0}
    return call(self_attention.AttuneMutualSelfAttention, it.model, it.clip, it.trajectory, **settings, **masks)


def read_values_by_mask(it):
    return read_values(it, source_mask=half(), target_mask=half())


def preserve_context(it):
    settings = TARGET, half(), True, 0.0, 0, self_attention.EVERY, 0.0, 0, self_attention.BY_SOURCE
    return call(self_attention.AttuneContextPreserving, it.model, it.clip, it.trajectory, *settings)


def prompt_regions(it):
    settings = {"prompt": SOURCE, "prompt_1": TARGET, "prompt_2": LONGER, "mask_1": half(), "mask_2": 1 - half()}
    return call(self_attention.AttuneRegionPrompts, it.model, it.clip, **settings)


def half():
    """A mask of the picture's left half."""
    mask = torch.zeros(1, 128, 128)
    mask[..., :64] = 1
    return mask


EDITS = {
    "swap": swap,
    "swap again, cached": swap_again,
    "refine": refine,
    "swap and re-weight": swap_and_reweight,
    "swap and local blend": swap_and_blend,
    "free prompt editing": read_maps,
    "mutual self-attention": read_values,
    "mutual, masked": read_values_by_mask,
    "context preserving": preserve_context,
    "region prompts": prompt_regions,
}


# ---- measuring ---------------------------------------------------------------------------------------------------


def ways(it, edits=EDITS):
    """What is compared: name -> (model, positive, guidance), and the negative where an edit has its own."""
    plain = it.text(TARGET)
    found = {STOCK: (it.model, plain, GUIDANCE), "guidance 1": (it.model, plain, 1.0)}
    for name, make in edits.items():
        model, positive, *negative = make(it)
        found[name] = (model, positive, GUIDANCE, *negative)
    return found


def time_of(unet, run):
    """Rows that the UNet is run on while ``run()`` works, and its seconds by the wall's clock and the processor's."""
    rows = []
    handle = unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    wall, busy = time.perf_counter(), time.process_time()
    try:
        run()
    finally:
        handle.remove()
    return sum(rows), time.perf_counter() - wall, time.process_time() - busy


def peak(run):
    """The most bytes that tensors made in ``run()`` held at any one time."""
    with LiveBytes() as live:
        run()
    return live.peak


def turns(runs, repeats):
    """Two tables by name. What :func:`time_of` says of its (unet, run) in each of ``repeats`` turns: all of them, turn
    about, so that whatever else the machine does falls on all alike. And the most bytes that tensors made in it held,
    taken in a turn before these, which also does whatever happens only once.
    """
    peaks = {name: peak(run) for name, (_, run) in runs.items()}
    seen = {name: [] for name in runs}
    for turn in range(repeats):
        for name, one in runs.items():
            seen[name].append(time_of(*one))
        log.info("turn %d of %d", turn + 1, repeats)
    return seen, peaks


def over(seen, name, base, clock, by_row=False):
    """How many times as long one took as another, ``clock`` 1 being the wall's and 2 the processor's: the median of the
    turns; ``by_row`` of the UNet."""
    pairs = zip(seen[name], seen[base], strict=True)
    return statistics.median(m[clock] / b[clock] * (b[0] / m[0] if by_row else 1) for m, b in pairs)


def times(it, repeats):
    """Name -> rows a step, and seconds a row over stock sampling's: the median over turns."""
    runs = {name: (it.unet, functools.partial(it.sample, *way)) for name, way in ways(it).items()}
    seen, _ = turns(runs, repeats)
    # Beside other packs an edit's three rows come as one and two; this is what that takes where nothing is edited.
    alone = seen.pop("guidance 1")
    seen[APART] = [tuple(a + b for a, b in zip(*pair, strict=True)) for pair in zip(alone, seen[STOCK], strict=True)]
    return {
        name: {
            "rows a step": round(measured[0][0] / it.steps, 2),
            "milliseconds a row": round(1000 * statistics.median(m[1] / m[0] for m in measured), 1),
            "a row over stock": round(over(seen, name, STOCK, 1, by_row=True), 3),
            "the same by the processor's clock": round(over(seen, name, STOCK, 2, by_row=True), 3),
        }
        for name, measured in seen.items()
    }


def memory(it):
    """Name -> the most bytes that tensors held in one sampling, and over stock sampling's with the weights."""
    weights = sum(p.numel() * p.element_size() for p in it.unet.parameters())
    peaks = {name: peak(functools.partial(it.sample, *way)) for name, way in ways(it).items() if name != "guidance 1"}
    return {
        name: {
            "peak MB": round(most / 1e6, 2),
            "over stock": round(most / peaks[STOCK], 3),
            "over stock, weights counted": round((most + weights) / (peaks[STOCK] + weights), 3),
        }
        for name, most in peaks.items()
    }


class Kernels:
    """In its `with`, every self-attention layer that an edit changes is run twice, turn and turn about: as the edit has
    it, and as the host does it on the target's own q, k, v. ``seen``: picture tokens -> pairs of seconds.
    """

    def __init__(self):
        self.seen = {}

    def __enter__(self):
        self.edited = edited = patches._EditPatch._self_attention
        seen, clock = self.seen, time.perf_counter

        def timed(patch, own, options, attend, inner, tasks, held):
            ways = [
                lambda: edited(patch, own, options, attend, inner, tasks, held),
                lambda: attend(*own, options),
            ]
            pairs = seen.setdefault(own.q.shape[1], [])
            made, took = [None, None], [0.0, 0.0]
            for way in (0, 1) if len(pairs) % 2 else (1, 0):
                began = clock()
                made[way] = ways[way]()
                took[way] = clock() - began
            if tasks:
                pairs.append(took)
            return made[0]

        patches._EditPatch._self_attention = timed
        return self

    def __exit__(self, *_):
        patches._EditPatch._self_attention = self.edited


def kernels(it, repeats):
    """Picture tokens -> what attention with the source's maps takes beside the host's own: medians over all layers of
    that size, all steps and turns.
    """
    way = *EDITS["free prompt editing"](it), 7.5
    it.sample(*way)  # thrown away: whatever happens only once
    with Kernels() as kernels:
        for _ in range(repeats):
            it.sample(*way)
    out = {}
    for tokens, pairs in sorted(kernels.seen.items(), reverse=True):
        edited, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
        out[f"{tokens} tokens"] = {
            "with the source's maps, microseconds": round(1e6 * edited, 1),
            "the host's own, microseconds": round(1e6 * plain, 1),
            "over the host's own": round(statistics.median(a / b for a, b in pairs), 3),
        }
    return out


def table(found):
    """The figures as Markdown."""
    keys = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = ["| | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(row.get(k, "")) for k in keys) + " |" for name, row in found.items()]
    return "\n".join(lines)


def kept():
    """The figures of all benchmarks of edits."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(benchmark, part, found):
    """Puts a part's figures among those that are there."""
    known = kept()
    known.setdefault(benchmark, {})[part] = found
    RESULTS.write_text(json.dumps(known, indent=2) + "\n")


SIZES = {"demo": (demo_size, 20, 11), "full": (full_size, 2, 5)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=(*SIZES, "all"), default="all")
    parser.add_argument("--part", choices=("edits", "kernel", "all"), default="all")
    parser.add_argument("--steps", type=int, help="20 at the demo size, 2 at the full one")
    parser.add_argument("--repeats", type=int, help="turns; 11 at the demo size, 5 at the full one")
    parser.add_argument("--edits", nargs="+", choices=tuple(EDITS), help="only these; nothing is kept then")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    comfy.utils.PROGRESS_BAR_ENABLED = False
    for name in set(EDITS) - set(args.edits or EDITS):
        del EDITS[name]
    for size, (make, steps, repeats) in SIZES.items():
        if args.size not in (size, "all"):
            continue
        with torch.inference_mode():
            it, parts = make(args.steps or steps), {}
            if args.part in ("edits", "all"):
                rows = memory(it)
                found = times(it, args.repeats or repeats)
                parts[size] = {name: row | rows.get(name, {}) for name, row in found.items()}
            if args.part in ("kernel", "all") and not args.edits:
                parts[f"{size}, kernel"] = kernels(it, args.repeats or repeats)
        for part, found in parts.items():
            log.info("\n%s size, latents of %s:\n%s", part, list(it.noise["samples"].shape[2:]), table(found))
            if not args.edits:
                keep("cost", part, found)


if __name__ == "__main__":
    main()
