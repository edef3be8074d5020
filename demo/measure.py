"""Measures the demo model and the edits on held-out scenes. Run through ``python3 dev.py score``.

    dev.py score                   everything; each part is written to demo/weights/quality.json
    dev.py score checker           the checker on true renders
    dev.py score generation        what pictures of held-out captions really show, at guidance 7.5 and 3
    dev.py score attention         nouns' cross-attention against the true masks
    dev.py score inversion         reconstruction from inverted noise beside the autoencoder's
    dev.py score edits             colour swaps with attention control, and without

Every picture is made by the pack's and the host's own nodes. Pictures go to demo/run/.
"""

import argparse
import json
import logging
from pathlib import Path

import comfy.sd
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as custom
import folder_paths
import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import nodes as stock

from ..attention_patches import host, maps
from ..inversion import host as runs
from ..inversion.report import decibels
from ..nodes import demo, edit, invert, sheet
from . import checker, scenes
from .model import load_demo

HERE = Path(__file__).parent
RUN = HERE / "run"
log = logging.getLogger("attune.score")


def call(node, *args, **kwargs):
    """A node's outputs, whether it is written in the host's older or newer style."""
    if hasattr(node, "execute"):
        return node.execute(*args, **kwargs).result
    return getattr(node(), node.FUNCTION)(*args, **kwargs)


def is_demo(path):
    """Whether a file holds a demo model's weights, which the host's own loader does not know."""
    try:
        with safe_open(str(path), "pt") as file:
            return "text.token_ids" in set(file.keys())
    except (OSError, SafetensorError):
        return False


def load_checkpoint(path):
    """MODEL, CLIP and VAE of a file: a Stable Diffusion 1.x checkpoint by the host's own loader, or a demo model's
    weights. Raises ValueError for a file that is not there, and for a checkpoint of another kind."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}; --checkpoint takes the path of a Stable Diffusion 1.x checkpoint.")
    if is_demo(path):
        return load_demo(path)
    embeddings = folder_paths.get_folder_paths("embeddings")
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=embeddings)[:3]
    config = getattr(getattr(model, "model", None), "model_config", None)
    plain = isinstance(config, comfy.supported_models.SD15) and config.unet_config.get("in_channels", 4) == 4
    if not plain or clip is None or vae is None:
        kind = type(config).__name__ if config is not None else "no diffusion model"
        raise ValueError(
            f"{path.name} holds {kind}{' that reads more than a latent' * (not plain and kind == 'SD15')}, but a "
            "whole Stable Diffusion 1.x checkpoint is needed, with its text encoder and autoencoder; give --checkpoint "
            "another file."
        )
    return model, clip, vae


class Bench:
    """The demo model, or the checkpoint of a path, and held-out scenes, the same ones for every seed."""

    def __init__(self, count, seed, steps, guidance, checkpoint=None):
        loaded = load_checkpoint(checkpoint) if checkpoint else call(demo.AttuneDemoCheckpoint)
        self.model, self.clip, self.vae = loaded
        self.count, self.seed, self.steps, self.guidance = count, seed, steps, guidance

    def scenes(self, objects=None):
        rng = np.random.default_rng([self.seed, 7])
        drawn = [scenes.draw_scene(rng, held_out=True, objects=objects) for _ in range(self.count)]
        rendered = [scenes.render(s) for s in drawn]
        return drawn, torch.from_numpy(np.stack([p for p, _ in rendered])), [torch.from_numpy(m) for _, m in rendered]

    def text(self, *prompts):
        """One CONDITIONING whose rows are the prompts'; the host reads it row by row."""
        encoded = [call(stock.CLIPTextEncode, self.clip, p)[0][0] for p in prompts]
        pooled = torch.cat([e[1]["pooled_output"] for e in encoded])
        return [[torch.cat([e[0] for e in encoded]), {"pooled_output": pooled}]]

    def encode(self, pictures):
        return call(stock.VAEEncode, self.vae, pictures)[0]

    def decode(self, latent):
        return call(stock.VAEDecode, self.vae, latent)[0]

    def invert(self, latent, conditioning):
        settings = self.steps, invert.GRIDS[0], invert.LEVELS[0]
        return call(invert.AttuneDDIMInversion, self.model, latent, conditioning, *settings)

    def sample(self, model, positive, guidance, sigmas, noise, negative=None):
        euler = call(custom.KSamplerSelect, "euler")[0]
        negative = self.text("") if negative is None else negative
        drawn = call(custom.SamplerCustom, model, False, 0, guidance, positive, negative, euler, sigmas, noise)[0]
        return self.decode(drawn)


def save(name, pictures, columns=8):
    """Pictures (B, H, W, 3) as one sheet."""
    tiles = [sheet.to_pil(p) for p in pictures]
    RUN.mkdir(exist_ok=True)
    sheet.rows_of(tiles, columns).save(RUN / name)


def measure_checker(bench):
    drawn, pictures, _ = bench.scenes()
    marks = [checker.grade(p.numpy(), s) for p, s in zip(pictures, drawn, strict=True)]
    return {key: round(float(np.mean([m[key] for m in marks])), 3) for key in marks[0]}


def measure_generation(bench):
    drawn, _, _ = bench.scenes()
    out = {}
    for guidance in (7.5, 3.0):
        pictures = []
        for first in range(0, len(drawn), 16):
            prompts = [scenes.caption(s) for s in drawn[first : first + 16]]
            empty = {"samples": torch.zeros(len(prompts), 4, 16, 16)}
            settings = bench.seed + first, bench.steps, guidance, "euler", "ddim_uniform"
            latent = call(stock.KSampler, bench.model, *settings, bench.text(*prompts), bench.text(""), empty)[0]
            pictures.append(bench.decode(latent))
        pictures = torch.cat(pictures)
        save(f"generation_{guidance:g}.png", pictures)
        marks = [checker.grade(p.numpy(), s) for p, s in zip(pictures, drawn, strict=True)]
        out[f"guidance {guidance:g}"] = {k: round(float(np.mean([m[k] for m in marks])), 3) for k in marks[0]}
    return out


def measure_attention(bench):
    drawn, pictures, masks = bench.scenes()
    levels = [float(bench.model.get_model_object("model_sampling").sigmas[t]) for t in (100, 300, 500, 700, 900)]
    thresholds = np.linspace(0.05, 0.95, 19)
    scores = {}
    for i, source in enumerate(drawn):
        caption = scenes.caption(source)
        nouns = [w for w in host.read_words(bench.clip, caption).words if w.text in scenes.SHAPES]
        gathered = maps.MapSum([noun.positions for noun in nouns])

        def receive(place, own, heads, gathered=gathered):
            if place.kind == "cross":
                gathered.add(place, own, heads)

        def body(denoise, latent, report):
            generator = torch.Generator().manual_seed(bench.seed)
            for sigma in levels:
                denoise(latent + sigma * torch.randn(latent.shape, generator=generator).to(latent), sigma)

        latent = bench.encode(pictures[i : i + 1])["samples"]
        runs.walk(host.recording(bench.model, receive), bench.text(caption), latent, torch.tensor([1.0, 0.0]), body)
        for tokens in (256, 64):
            for heat, mask in zip(gathered.level(tokens), masks[i], strict=True):
                true = torch.nn.functional.adaptive_avg_pool2d(mask[None], heat.shape[1:])[0] > 0.5
                share = (heat / heat.max())[0]
                at = [(share > t) for t in thresholds]
                iou = [float((a & true).sum() / (a | true).sum().clamp(min=1)) for a in at]
                scores.setdefault(tokens, []).append(iou)
    out = {}
    for tokens, rows in scores.items():
        mean = np.mean(rows, 0)
        side = int(tokens**0.5)
        out[f"noun IoU at {side}x{side}"] = round(float(mean.max()), 3)
        out[f"best threshold at {side}x{side}"] = round(float(thresholds[mean.argmax()]), 2)
    return out


def measure_inversion(bench):
    drawn, pictures, _ = bench.scenes()
    captions = bench.text(*(scenes.caption(s) for s in drawn))
    latent = bench.encode(pictures)
    _, noise, sigmas = bench.invert(latent, captions)
    out = {"autoencoder dB": round(decibels((bench.decode(latent) - pictures).square()), 2)}
    for guidance in (1.0, 3.0, 7.5):
        back = bench.sample(bench.model, captions, guidance, sigmas, noise)
        out[f"reconstruction at guidance {guidance:g} dB"] = round(decibels((back - pictures).square()), 2)
        if guidance == 1:
            out["the same against the autoencoder's own dB"] = round(
                decibels((back - bench.decode(latent)).square()), 2
            )
    return out


def measure_edits(bench, cross=0.8, self_=0.8, margin=4):
    """Colour swaps of each scene's first object; beside them plain sampling with the target prompt from the same
    noise, and the true edited picture after the autoencoder, which no edit can be expected to beat.

    What is outside is measured against the reconstruction: on every pixel off the true mask, and on those at least
    ``margin`` pixels off it, where the autoencoder's blur at the object's outline does not reach.
    """
    drawn, pictures, masks = bench.scenes()
    rng = np.random.default_rng([bench.seed, 9])
    names = ("with attention control", "without", "the truth through the autoencoder")
    marks, shown = {name: [] for name in names}, []
    for i, source in enumerate(drawn):
        used = {t.color for t in source.things} | {source.background}
        color = str(rng.choice([c for c in scenes.COLORS if c not in used]))
        target = scenes.edit_thing(source, 0, color=color)
        before, after = scenes.caption(source), scenes.caption(target)
        trajectory, noise, sigmas = bench.invert(bench.encode(pictures[i : i + 1]), bench.text(before))
        again = bench.sample(bench.model, bench.text(before), 1.0, sigmas, noise)
        windows = (0.0, cross, 0.0, self_, 1024)
        model, positive = call(edit.AttunePromptSwap, bench.model, bench.clip, trajectory, before, after, *windows)
        edited = bench.sample(model, positive, bench.guidance, sigmas, noise)
        plain = bench.sample(bench.model, bench.text(after), bench.guidance, sigmas, noise)
        truth = bench.decode(bench.encode(torch.from_numpy(scenes.render(target)[0])[None]))
        mask = masks[i][0]
        off = torch.nn.functional.max_pool2d(mask[None], 2 * margin + 1, 1, margin)[0] == 0
        for name, picture in zip(names, (edited, plain, truth), strict=True):
            error = (picture - again).square()[0]
            right = checker.color_of(picture[0][mask > 0.99].numpy()) == color
            marks[name].append((right, decibels(error[mask == 0][None]), decibels(error[off][None])))
        shown += [pictures[i], again[0], edited[0], plain[0]]
        log.info("edit %d of %d: %s -> %s, %s", i + 1, len(drawn), before, color, marks[names[0]][-1])
    save("edits.png", shown, 8)
    keys = ("new colour", "outside dB", f"outside by {margin} pixels dB")
    out = {
        name: {key: round(float(np.mean(column)), 3) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}
        for name, rows in marks.items()
    }
    return out | {"settings": {"cross_end": cross, "self_end": self_, "guidance": bench.guidance}}


PARTS = {
    "checker": (measure_checker, 500),
    "generation": (measure_generation, 64),
    "attention": (measure_attention, 32),
    "inversion": (measure_inversion, 32),
    "edits": (measure_edits, 32),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--count", type=int, help="held-out scenes (500 for the checker, 64 pictures, else 32)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0, help="of the edits; others than 2 are printed only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    card = HERE / "weights" / "quality.json"
    for name, (measure, count) in PARTS.items():
        if args.part not in (name, "all"):
            continue
        count = args.count or count
        with torch.inference_mode():
            bench = Bench(count, args.seed, args.steps, args.guidance)
            result = {"scenes": count, "steps": args.steps, "seed": args.seed} | measure(bench)
        log.info("%s: %s", name, json.dumps(result, indent=2))
        if args.guidance != parser.get_default("guidance"):
            continue
        quality = json.loads(card.read_text()) if card.exists() else {}
        card.write_text(json.dumps(quality | {name: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
