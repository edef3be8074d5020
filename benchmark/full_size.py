"""Every workflow for Stable Diffusion 1.5 at its real size, with random weights made on the fly: no download.

The checkpoint has SD 1.5's configuration and file layout in fp16, under the name that the workflows ask for, and so has
the T2I-Adapter. Each workflow runs as it is shipped, on a real server of its own over HTTP; only the picture's side and
the number of steps are changed, and how often embeddings are updated. What is checked: that it runs, that the stock
loader misses no tensor, in which types the weights lie in memory, that every decoded picture has the right side, is no
flat colour (which is what not-a-number comes to) and differs from the others; and what memory the server took.

Results are lines of JSON in demo/run/full_size; what is among them with the same settings is not run again.
"""

import argparse
import json
import logging
import re
import shutil
import tempfile
import threading
import time
from itertools import combinations
from pathlib import Path

import comfy.ops
import numpy as np
import psutil
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.sd1_clip import SD1ClipModel
from comfy.t2i_adapter.adapter import Adapter
from PIL import Image
from safetensors.torch import save_file

from ..demo.model import UNET
from ..tests import host
from ..tests.server import workflow
from .cost import FULL, table

RESULTS = Path(__file__).resolve().parents[1] / "demo" / "run" / "full_size" / "results.jsonl"
CHECKPOINT, ADAPTER = "v1-5-pruned-emaonly-fp16.safetensors", "t2iadapter_sketch_sd15v2.pth"
PICTURE = "example.png"
AUTOENCODER = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
SAMPLERS = {"SamplerCustom", "KSampler", "AttuneRecordTrajectory", "AttuneIntermediate"}
SAVE, LOAD = "Attune - Save and reuse a trajectory", "Attune - Edit a saved trajectory"
FLAT = 2.0  # levels of 255: a picture that varies less is one colour
BLENDED = "with local blend"  # in a random network words look everywhere, so there the mask is white
log = logging.getLogger("attune.bench")


# ---- random files ------------------------------------------------------------------------------------------------


def filled(module, random):
    """The tensors of a module on the meta device, fp16, with values that keep signals in bounds."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            tensors[name] = (torch.randn(tensor.shape, generator=random) / tensor[0].numel() ** 0.5).half()
        elif tensor.ndim == 1:
            tensors[name] = torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.float16)
    return tensors


def checkpoint(random):
    """SD 1.5's UNet, CLIP-L and autoencoder under the names of the original file."""
    ops = comfy.ops.disable_weight_init
    with torch.device("meta"):
        unet = UNetModel(**UNET | FULL, dtype=torch.float32, operations=ops)
        text, autoencoder = SD1ClipModel(), AutoencoderKL(ddconfig=AUTOENCODER, embed_dim=4)
    unet, text, autoencoder = (filled(module, random) for module in (unet, text, autoencoder))
    # A random network is no denoiser; small last layers keep its runs tame, and pictures between black and white.
    unet["out.2.weight"] *= 0.5
    autoencoder["decoder.conv_out.weight"] *= 0.3
    text = {name: t for name, t in text.items() if "text_projection" not in name}
    parts = {"model.diffusion_model.": unet, "first_stage_model.": autoencoder, "": text}
    named = {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    return {name.replace("clip_l.", "cond_stage_model.", 1): tensor for name, tensor in named.items()}


def adapter(random):
    """SD 1.5's T2I-Adapter for sketches."""
    with torch.device("meta"):
        net = Adapter([320, 640, 1280, 1280], nums_rb=2, cin=64, ksize=1, sk=True, use_conv=False, xl=False)
    return filled(net, random)


def painted(path):
    """The host's example picture with a place painted as its mask editor does it: transparent there."""
    picture = np.array(Image.open(path).convert("RGBA"))
    height, width = picture.shape[:2]
    picture[height // 4 : height // 2, width // 4 : width // 2, 3] = 0
    return Image.fromarray(picture)


def furnish(base, release):
    """Puts into a base folder what the workflows ask for, where it is not yet."""
    for folder in ("models/checkpoints", "models/controlnet", "input"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    made = base / "models" / "checkpoints" / CHECKPOINT
    if not made.exists():
        log.info("making %s", made)
        random = torch.Generator().manual_seed(0)
        torch.save(adapter(random), base / "models" / "controlnet" / ADAPTER)
        painted(release.path / "input" / PICTURE).save(base / "input" / PICTURE)
        part = made.with_suffix(".part")
        save_file(checkpoint(random), part)
        part.rename(made)


# ---- one workflow ------------------------------------------------------------------------------------------------


def names(only=()):
    """The workflows that load SD 1.5's checkpoint, cheapest first; one that edits a saved trajectory after the one that
    saves it. ``only``: parts of names.
    """
    cost = {}
    for name in workflow.NAMES:
        nodes = workflow.load(name).values()
        if any(node["inputs"].get("ckpt_name") == CHECKPOINT for node in nodes):
            learns = any(key in node["inputs"] for node in nodes for key in workflow.UPDATES)
            cost[name] = learns, sum(node["class_type"] in SAMPLERS for node in nodes), name
    cost[LOAD] = (*cost[SAVE], LOAD)
    return [name for name in sorted(cost, key=cost.get) if not only or any(part in name for part in only)]


class Peak:
    """In its `with`, watches the memory that a process holds. ``bytes``: the most that was seen, every 20 ms."""

    def __init__(self, process):
        self.process, self.bytes, self._end = psutil.Process(process), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self):
        while not self._end.wait(0.02):
            try:
                self.bytes = max(self.bytes, self.process.memory_info().rss)
            except psutil.NoSuchProcess:
                return

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


def look(prompt, entry, server, side):
    """How many pictures there are, and what is wrong with those that were decoded: sentences."""
    faults, decoded = [], {}
    shown = workflow.saved(prompt, entry)
    for node in prompt.values():
        title, source = node["_meta"]["title"], node["inputs"].get("images")
        if title not in shown or not source or prompt[source[0]]["class_type"] != "VAEDecode":
            continue
        picture = decoded[title] = workflow.pixels(server, shown[title])
        if picture.shape != (side, side, 3):
            faults.append(f"{title} is {picture.shape}, not {side} x {side}.")
        elif picture.std() < FLAT:
            faults.append(f"{title} is one flat colour.")
    for one, other in combinations(set(decoded) - {BLENDED}, 2):
        if decoded[one].shape == decoded[other].shape and (decoded[one] == decoded[other]).all():
            faults.append(f"{one} and {other} are the same picture.")
    return len(shown), len(decoded), faults


def told(text):
    """What the server's log says of the weights' types, and of tensors that were missed."""
    types = re.search(r"model weight dtype (\S+), manual cast: (\S+)", text)
    encoder = re.search(r"CLIP/text encoder model load device: .* dtype: (\S+)", text)
    decoder = re.search(r"VAE load device: .* dtype: (\S+)", text)
    found = {
        "unet": types and types[1], "computed in": types and types[2], "text": encoder and encoder[1],
        "autoencoder": decoder and decoder[1],
    }  # fmt: skip
    faults = [line.strip() for line in text.splitlines() if re.search(r"missing|left over|invalid value", line)]
    return {key: (value or "not said").replace("torch.", "") for key, value in found.items()}, faults


def measure(name, release, base, side, steps, updates):
    """One workflow on a server of its own. Returns a line of the results."""
    prompt = workflow.resized(workflow.load(name), side, steps, updates)
    row = {"workflow": name, "side": side, "steps": steps, "updates": updates, "host": str(release)}
    cpu = not host.has_accelerator(release.python)
    # Left alone, the host takes a file of fp16 apart into fp32 on a CPU; on a GPU the weights stay as they are.
    options = ("--fp16-unet",) if cpu else ()
    with host.Server(release, base=base, cpu=cpu, options=options) as server:
        began = time.perf_counter()
        with Peak(server.process.pid) as peak:
            time.sleep(0.1)
            idle = peak.bytes
            try:
                entry = server.run(prompt, timeout=3 * 3600)
                row["pictures"], row["decoded"], faults = look(prompt, entry, server, side)
            except host.HostError as error:
                faults = [str(error)]
        row["seconds"] = round(time.perf_counter() - began)
        row |= {"idle MB": round(idle / 1e6), "peak MB": round(peak.bytes / 1e6)}
        row["types"], missed = told(server.log_path.read_text(encoding="utf-8", errors="replace"))
    return row | {"faults": faults + missed}


# ---- the command -------------------------------------------------------------------------------------------------


def known():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def shown(rows):
    """The results as Markdown."""
    return table({
        row["workflow"].removeprefix("Attune - "): {
            "holds": "no" if row["faults"] else "yes",
            "pictures": row.get("pictures", 0),
            "of them decoded": row.get("decoded", 0),
            "weights": ", ".join(f"{part} {kind}" for part, kind in row["types"].items()),
            "peak MB": row["peak MB"],
            "idle MB": row["idle MB"],
            "seconds": row["seconds"],
            "faults": " ".join(row["faults"])[:300].replace("\n", " "),
        }
        for row in rows
    })  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=(), help="parts of workflows' names")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--updates", type=int, default=2, help="at most so many to an embedding a step")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "attune_full_size",
                        help="a folder for the random files, 2.2 GB")  # fmt: skip
    parser.add_argument("--anew", action="store_true", help="forget the results that are there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    release = host.Host.current()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    if args.anew:
        RESULTS.unlink(missing_ok=True)
        shutil.rmtree(args.scratch / "output", ignore_errors=True)
    furnish(args.scratch, release)
    settings = {"side": args.side, "steps": args.steps, "updates": args.updates, "host": str(release)}
    rows = {row["workflow"]: row for row in known() if settings.items() <= row.items()}  # the last of each
    todo = [name for name in names(args.only) if name not in rows or rows[name]["faults"]]
    for number, name in enumerate(todo, 1):
        log.info("%d of %d: %s", number, len(todo), name)
        row = measure(name, release, args.scratch, args.side, args.steps, args.updates)
        rows[name] = row
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        log.info("  %s, %d s, at most %d MB", "; ".join(row["faults"]) or "holds", row["seconds"], row["peak MB"])
    log.info(
        "\n%d pixels, %d steps, at most %d updates a step\n\n%s",
        args.side,
        args.steps,
        args.updates,
        shown(rows.values()),
    )
    return 1 if any(row["faults"] for row in rows.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
