"""Trains the demo model on scenes it draws itself. Run through ``python3 dev.py train``; every stage resumes.

    dev.py train autoencoder --minutes 5     pictures <-> latents
    dev.py train unet --minutes 90           text encoder and UNet, from this run or the shipped weights
    dev.py train decoder --minutes 10        polishes the decoder alone; latents, and so the UNet, stay as they are
    dev.py train export                      writes demo/weights/attune_demo.safetensors (fp16)
    dev.py train adapter --minutes 40        a sketch T2I-Adapter for the shipped weights, and writes its file

It runs on a GPU where there is one, else on the CPU. Logs, sample sheets and checkpoints go to demo/run/.

The UNet's recipe: epsilon prediction on SD's schedule, min-SNR-5 weights, squared error weighted on the objects,
offset noise (or the background would be read off the noise), and a small loss that keeps a word's cross-attention
on its object. The maps are therefore supervised, and the model card says so. With ``--variant NAME`` every stage keeps
to a folder and a file of its own.
"""

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from ..attention_patches.sketch import outlines
from . import checker, scenes
from .autoencoder import LATENT_SCALE, Autoencoder
from .model import ADAPTER, WEIGHTS, build_adapter, build_unet, read_weights, take_adapters, token_ids
from .text import TEXT_WIDTH, TextEncoder

HERE = Path(__file__).parent
RUN = HERE / "run"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
log = logging.getLogger("attune.train")

SIDE = scenes.SIZE // 8
CONTEXT = 77
START, END = 49406, 49407
SUPERVISED = "supervised: a loss keeps the cross-attention of nouns and adjectives on their objects"


def draw_batch(rng, count):
    drawn = [scenes.draw_scene(rng, held_out=False) for _ in range(count)]
    return drawn, [scenes.render(s) for s in drawn]


def to_tensor(pictures):
    """(H, W, 3) pictures in 0..1 to a (B, 3, H, W) tensor in -1..1."""
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous() * 2 - 1


def psnr(error):
    """dB from a mean squared error in the -1..1 range."""
    return 10 * math.log10(4 / max(float(error.detach()), 1e-12))


def cosine(done, flat=0.35):
    """Learning rate factor over the share of the run that is done: flat, then a cosine to nothing."""
    return 1.0 if done < flat else 0.5 + 0.5 * math.cos(math.pi * min(1.0, (done - flat) / (1 - flat)))


# ---- autoencoder -------------------------------------------------------------------------------------------------


def trained_autoencoder():
    """This run's autoencoder, or the shipped one where there is no run."""
    path = RUN / "autoencoder.pt"
    net = Autoencoder().to(DEVICE)
    net.load_state_dict(torch.load(path, map_location=DEVICE) if path.exists() else read_weights()["autoencoder"])
    return net


def train_autoencoder(args, decoder_only=False):
    path = RUN / "autoencoder.pt"
    rng = np.random.default_rng([args.seed, decoder_only])
    if decoder_only or path.exists():
        net = trained_autoencoder()
    else:
        net = Autoencoder().to(DEVICE)
        net.start_from_patches(to_tensor([p for p, _ in draw_batch(rng, 256)[1]]).to(DEVICE))
    trained = [p for n, p in net.named_parameters() if not decoder_only or n.startswith(("decoder", "linear_out"))]
    optimizer = torch.optim.AdamW(trained, lr=args.lr or 2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    begin, step = time.time(), 0
    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (args.lr or 2e-3) * min(1, (step + 1) / 50) * cosine(done, 0.5)
        x = to_tensor([p for p, _ in draw_batch(rng, 16)[1]]).to(DEVICE)
        if decoder_only:
            with torch.no_grad():
                z = net.encode(x) * LATENT_SCALE
            back = net.decode((z + 0.05 * torch.randn_like(z)) / LATENT_SCALE)
        else:
            z = net.encode_plain(x)
            back = net.decode_plain(z + 0.05 * torch.randn_like(z))
        error = (back - x).square().mean()
        loss = error * 4 + (back - x).abs().mean() + (0 if decoder_only else 1e-3 * z.square().mean())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step % 20 == 0:
            log.info("autoencoder step %d, %d%%: %.2f dB", step, 100 * done, psnr(error))
        step += 1
    with torch.no_grad():
        if not decoder_only:
            many = [net.encode_plain(to_tensor([p for p, _ in draw_batch(rng, 64)[1]]).to(DEVICE)) for _ in range(8)]
            net.set_statistics(torch.cat(many))
        x = to_tensor([p for p, _ in draw_batch(np.random.default_rng(1), 64)[1]]).to(DEVICE)
        back = net.decode(net.encode(x)).clamp(-1, 1)
        log.info("autoencoder: %.2f dB on fresh scenes after %d steps", psnr((back - x).square().mean()), step)
    torch.save(net.state_dict(), path)
    sheet = torch.cat([x[:8], back[:8]]).movedim(1, -1).cpu().numpy() * 0.5 + 0.5
    save_sheet(RUN / "autoencoder.png", sheet, 8)


def save_sheet(path, pictures, columns):
    from PIL import Image

    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    Image.fromarray((np.clip(np.concatenate(rows, 0), 0, 1) * 255).round().astype(np.uint8)).save(path)


# ---- data --------------------------------------------------------------------------------------------------------


class Chapter:
    """A few thousand scenes with their latents and masks at latent size; captions are drawn anew at each use."""

    def __init__(self, net, rng, count):
        self.scenes, latents, self.masks = [], [], torch.zeros(count, 2, SIDE, SIDE)
        for first in range(0, count, 64):
            drawn, rendered = draw_batch(rng, 64)
            with torch.no_grad():
                latents.append(net.encode(to_tensor([p for p, _ in rendered]).to(DEVICE)).cpu() * LATENT_SCALE)
            for i, (_, masks) in enumerate(rendered):
                small = F.avg_pool2d(torch.from_numpy(masks)[None], 8)[0]
                self.masks[first + i, : len(small)] = small
            self.scenes += drawn
        self.latents = torch.cat(latents)

    def batch(self, rng, rows, size):
        """Latents, masks, rows of the embedding table, (B, 2, 77) which column describes which object how much, and
        the scenes' numbers."""
        pick = rng.integers(len(self.scenes), size=size)
        tokens = torch.full((size, CONTEXT), rows[END])
        owners = torch.zeros(size, 2, CONTEXT)
        tokens[:, 0] = rows[START]
        for row, index in enumerate(pick):
            if rng.random() < 0.1:
                continue  # the empty prompt, for guidance
            words = scenes.caption_words(self.scenes[index], rng)
            if rng.random() < 0.1:  # words the model does not know, so that they come to mean nothing
                at = int(rng.choice([0, len(words)]))
                words[at:at] = [(None, None)] * int(rng.integers(1, 4))
            for column, (word, owner) in enumerate(words, 1):
                tokens[row, column] = rows[word]
                if owner is not None and word not in ("a", "an"):
                    owners[row, owner, column] = 1.0 if word in scenes.SHAPES else 0.5
        parts = (self.latents[pick], self.masks[pick], tokens, owners)
        return *(part.to(DEVICE) for part in parts), pick


# ---- UNet --------------------------------------------------------------------------------------------------------


def alphas_bar():
    """SD's schedule: 1000 steps, square roots of beta evenly spaced from 0.00085 to 0.012."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0).float().to(DEVICE)


def weights_of_time(bar):
    """Min-SNR-5: how much the squared error at each of 1000 times counts."""
    snr = bar / (1 - bar)
    return snr.clamp(max=5) / snr


def object_error(predicted, noise, masks):
    """The squared error of each picture (B,), six times as much on its objects as elsewhere."""
    focus = 1 + 5 * F.max_pool2d(masks.amax(1, keepdim=True), 3, 1, 1)
    focus = focus / focus.mean((1, 2, 3), keepdim=True)
    return ((predicted - noise).square() * focus).mean((1, 2, 3))


def plain_attention(_kernel, q, k, v, heads, *_args, **_kwargs):
    b, _, c = q.shape
    q, k, v = (t.view(b, -1, heads, c // heads).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)


class MapCollector:
    """Cross-attention that keeps its probabilities at the levels where objects can be seen."""

    def __init__(self):
        self.maps = []

    def __call__(self, q, k, v, options):
        heads = options["n_heads"]
        b, n, c = q.shape
        q, k, v = (t.view(b, -1, heads, c // heads).transpose(1, 2) for t in (q, k, v))
        p = (q @ k.transpose(-1, -2) * (c // heads) ** -0.5).softmax(-1)
        if n >= (SIDE // 2) ** 2 and options["block"][0] != "middle":
            self.maps.append(p.mean(1))
        return (p @ v).transpose(1, 2).reshape(b, n, c)

    def options(self):
        places = [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
        return {
            "patches_replace": {"attn2": dict.fromkeys(places, self)},
            "optimized_attention_override": plain_attention,
        }


def attention_loss(maps, masks, owners, keep):
    """The squared share of a describing word's cross-attention that falls outside its object's mask."""
    total = 0.0
    for p in maps:
        side = math.isqrt(p.shape[1])
        mask = F.adaptive_max_pool2d(masks, side).flatten(2).clamp(0, 1)  # (B, 2, N); thin parts count whole
        column = p / (p.sum(1, keepdim=True) + 1e-6)
        inside = torch.einsum("bon,bnt->bot", mask, column)
        weight = owners * keep[:, None, None]
        total = total + (weight * (1 - inside).square()).sum() / weight.sum().clamp(min=1)
    return total / len(maps)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = build_unet()
        self.text = TextEncoder(TEXT_WIDTH, len(vocabulary()))

    def forward(self, x, t, tokens, collector):
        return self.unet(x, t, self.text(tokens), transformer_options=collector.options())


def vocabulary():
    """Token id to row of the compact embedding table; words outside it share the row of None."""
    return {i: row for row, i in enumerate([START, END, *token_ids(scenes.WORDS).values(), None])}


def shipped_state():
    """The shipped weights under the names of :class:`Model`."""
    weights = read_weights()
    known = [-1 if i is None else i for i in vocabulary()]
    if weights["text"].pop("token_ids").tolist() != known:
        raise ValueError("The shipped weights know other words than scenes.WORDS; train from the start with --fresh.")
    return {f"{part}.{k}": v.float() for part in ("unet", "text") for k, v in weights[part].items()}


def shipped_progress():
    with safe_open(WEIGHTS, "pt") as file:
        return int(file.metadata()["steps"]), float(file.metadata()["minutes"])


def train_unet(args):
    net = trained_autoencoder()
    rows = vocabulary()
    rows |= {word: rows[i] for word, i in token_ids(scenes.WORDS).items()}
    model = Model().to(DEVICE)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    path, step, minutes = RUN / "unet.pt", 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=DEVICE)
        model.load_state_dict(state["model"])
        ema, step, minutes = state["ema"], state["step"], state["minutes"]
        optimizer.load_state_dict(state["optimizer"])
    elif WEIGHTS.exists() and not args.fresh:
        model.load_state_dict(shipped_state())
        ema, step, minutes = {k: v.detach().clone() for k, v in model.state_dict().items()}, *shipped_progress()
        log.info("going on from the shipped weights, %d steps", step)
    torch.manual_seed(args.seed + step)  # a resumed run draws other scenes and noise
    rng = np.random.default_rng([args.seed, step])
    bar = alphas_bar()
    weight_t = weights_of_time(bar)
    chapter, begin, first, mean = None, time.time(), step, None
    names, parameters = zip(*model.named_parameters(), strict=True)
    averaged = [ema[n] for n in names]

    def save():
        torch.save({"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step,
                    "minutes": minutes + (time.time() - begin) / 60}, path)  # fmt: skip

    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        if (step - first) % args.chapter_steps == 0:
            log.info("drawing %d scenes", args.scenes)
            chapter = Chapter(net, rng, args.scenes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step - first + 1) / 100) * cosine(done, args.flat)
        z, masks, tokens, owners, _ = chapter.batch(rng, rows, args.batch)
        early = step < args.high_noise_steps
        t = torch.randint(0, 1000, (args.batch,), device=DEVICE)
        if early:
            t = torch.where(torch.rand(args.batch, device=DEVICE) < 0.4, t // 2 + 500, t)
        offset = args.offset if not early else 0.25
        noise = torch.randn_like(z) + offset * torch.randn(*z.shape[:2], 1, 1, device=DEVICE)
        a = bar[t][:, None, None, None]
        collector = MapCollector()
        predicted = model(a.sqrt() * z + (1 - a).sqrt() * noise, t.float(), tokens, collector)
        loss_map = attention_loss(collector.maps, masks, owners, (t <= 750).float())
        loss = (object_error(predicted, noise, masks) * weight_t[t]).mean() + args.attention * loss_map
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(parameters), 1 - min(args.ema, (1 + step) / (10 + step)))
        mean = loss.item() if mean is None else 0.99 * mean + 0.01 * loss.item()
        if step % 50 == 0:
            pace = (time.time() - begin) / (step - first)
            log.info("step %d, %d%%: loss %.4f, outside %.3f, %.2f s a step", step, 100 * done, mean, loss_map, pace)
        if step % 500 == 0:
            save()
        if step % args.sheet_steps == 0:
            draw_sheet(ema, net, rows, bar, step)
    save()
    draw_sheet(ema, net, rows, bar, step)


@torch.no_grad()
def draw_sheet(weights, net, rows, bar, step, count=16, guidance=5.0):
    """Draws held-out captions with 25 DDIM steps, saves the pictures and logs what the checker sees in them."""
    model = Model().to(DEVICE).eval()
    model.load_state_dict(weights)
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(2)
    asked = [scenes.draw_scene(rng, held_out=True) for _ in range(count)]
    tokens = torch.full((2 * count, CONTEXT), rows[END])
    tokens[:, 0] = rows[START]
    for row, scene in enumerate(asked):
        for column, (word, _) in enumerate(scenes.caption_words(scene), 1):
            tokens[row, column] = rows[word]
    x = torch.randn(count, 4, SIDE, SIDE, generator=generator).to(DEVICE)
    for t in range(961, 0, -40):
        a, b = bar[t], bar[max(0, t - 40)]
        times = torch.full((2 * count,), float(t), device=DEVICE)
        eps = model(x.repeat(2, 1, 1, 1), times, tokens.to(DEVICE), MapCollector())
        eps = eps[count:] + guidance * (eps[:count] - eps[count:])
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    pictures = net.decode(x / LATENT_SCALE).movedim(1, -1).clamp(-1, 1).cpu().numpy() * 0.5 + 0.5
    marks = [checker.grade(p, s) for p, s in zip(pictures, asked, strict=True)]
    log.info("step %d shows %s", step, {k: float(np.mean([m[k] for m in marks])) for k in marks[0]})
    save_sheet(RUN / f"step_{step:06d}.png", pictures, 8)


# ---- sketch adapter ----------------------------------------------------------------------------------------------


class Sketches(Chapter):
    """A chapter with sketches of its scenes: outlines of the objects, or of all that is drawn, patterns too."""

    def __init__(self, net, rng, count):
        super().__init__(net, rng, count)
        self.things = torch.zeros(count, 2, scenes.SIZE, scenes.SIZE, dtype=torch.bool)
        self.lines = torch.zeros(count, scenes.SIZE, scenes.SIZE, dtype=torch.bool)
        for i, scene in enumerate(self.scenes):
            picture, masks = scenes.render(scene)
            self.things[i, : len(masks)] = torch.from_numpy(masks) > 0.5
            self.lines[i] = outlines(torch.from_numpy(picture)[None], 0.2, 1.0, 1)[0].bool()

    def hints(self, pick, rng):
        """(B, 1, H, W) sketches as people draw them: of all or some objects, thin or thick, with gaps, or none."""
        found = torch.zeros(len(pick), 1, scenes.SIZE, scenes.SIZE)
        for row, index in enumerate(pick):
            kind, width = rng.random(), int(rng.integers(1, 4))
            if kind < 0.08:
                continue
            things = self.things[index].float()
            kept = torch.tensor(rng.random(2) < 0.9)
            if kind < 0.6:
                lines = (outline(things, width) * kept[:, None, None]).amax(0)
            else:
                left_out = F.max_pool2d(things, 7, 1, 3) * ~kept[:, None, None]
                lines = self.lines[index].float() * (1 - left_out.amax(0))
                lines = F.max_pool2d(F.pad(lines[None], ((width - 1) // 2, width // 2) * 2), width, 1)[0]
            if rng.random() < 0.2:  # gaps
                gaps = torch.tensor(rng.random((1, 1, 16, 16)) < 0.15).float()
                lines = lines * (1 - F.interpolate(gaps, scenes.SIZE)[0, 0])
            found[row, 0] = lines.roll(tuple(rng.integers(-1, 2, 2)), (0, 1))
        return found


def outline(masks, width):
    """The lines (B, H, W) around masks (B, H, W) of 0 and 1, about ``width`` pixels wide."""
    outer, inner = (width + 1) // 2, width // 2
    grown = F.max_pool2d(masks[None], 2 * outer + 1, 1, outer)[0]
    shrunk = -F.max_pool2d(-masks[None], 2 * inner + 1, 1, inner)[0]
    return grown - shrunk


def train_adapter(args):
    net, adapter, model = trained_autoencoder(), build_adapter().to(DEVICE), Model().to(DEVICE)
    model.load_state_dict(shipped_state())
    model.requires_grad_(False)
    take_adapters(model.unet)
    rows = vocabulary()
    rows |= {word: rows[i] for word, i in token_ids(scenes.WORDS).items()}
    ema = {k: v.detach().clone() for k, v in adapter.state_dict().items()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    path, step, minutes = RUN / "adapter.pt", 0, 0.0
    if path.exists() and not args.fresh:
        state = torch.load(path, map_location=DEVICE)
        adapter.load_state_dict(state["adapter"])
        ema, step, minutes = state["ema"], state["step"], state["minutes"]
        optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(args.seed + step)
    rng = np.random.default_rng([args.seed, 7, step])
    bar, chapter, begin, first, mean = alphas_bar(), None, time.time(), step, None
    weight_t = weights_of_time(bar)
    names, parameters = zip(*adapter.named_parameters(), strict=True)
    averaged = [ema[n] for n in names]

    def save():
        spent = minutes + (time.time() - begin) / 60
        torch.save({"adapter": adapter.state_dict(), "ema": ema, "optimizer": optimizer.state_dict(), "step": step,
                    "minutes": spent}, path)  # fmt: skip
        about = {"command": "dev.py train " + " ".join(sys.argv[1:]), "steps": str(step), "minutes": f"{spent:.0f}",
                 "for": WEIGHTS.name}  # fmt: skip
        out = RUN / ADAPTER.name if args.variant else ADAPTER
        out.parent.mkdir(exist_ok=True)
        save_file({k: v.half().contiguous().cpu() for k, v in ema.items()}, out, metadata=about)

    while (done := (time.time() - begin) / (60 * args.minutes)) < 1:
        if (step - first) % args.chapter_steps == 0:
            log.info("drawing %d scenes", args.scenes)
            chapter = Sketches(net, rng, args.scenes)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step - first + 1) / 50) * cosine(done, args.flat)
        z, masks, tokens, _, pick = chapter.batch(rng, rows, args.batch)
        # What goes where is decided while there is much noise, so an adapter is taught there more often.
        t = (1000 * (1 - torch.rand(args.batch, device=DEVICE) ** 2)).long().clamp(max=999)
        noise = torch.randn_like(z) + args.offset * torch.randn(*z.shape[:2], 1, 1, device=DEVICE)
        a = bar[t][:, None, None, None]
        features = adapter(chapter.hints(pick, rng).to(DEVICE))
        options = {"optimized_attention_override": plain_attention}
        predicted = model.unet(
            a.sqrt() * z + (1 - a).sqrt() * noise, t.float(), model.text(tokens), control=features,
            transformer_options=options,
        )  # fmt: skip
        loss = (object_error(predicted, noise, masks) * weight_t[t]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(averaged, list(parameters), 1 - min(args.ema, (1 + step) / (10 + step)))
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 25 == 0:
            pace = (time.time() - begin) / (step - first)
            log.info("adapter step %d, %d%%: loss %.4f, %.2f s a step", step, 100 * done, mean, pace)
        if step % 250 == 0:
            save()
    save()


def export(args):
    """Writes one fp16 file: UNet, autoencoder, text encoder with only the rows of the words it knows."""
    state, rows = torch.load(RUN / "unet.pt", map_location="cpu"), vocabulary()
    tensors = {f"autoencoder.{k}": v.cpu() for k, v in trained_autoencoder().state_dict().items()} | state["ema"]
    tensors = {k: v.half().contiguous() for k, v in tensors.items()}
    tensors["text.token_ids"] = torch.tensor([-1 if i is None else i for i in rows], dtype=torch.int32)
    card = HERE / "weights" / "quality.json"
    about = {
        "command": args.made_by or "dev.py train " + " ".join(sys.argv[1:]),
        "seed": str(args.seed), "steps": str(state["step"]),
        "minutes": f"{state['minutes']:.0f}", "host": "ComfyUI 0.3.75, torch " + torch.__version__,
        "attention": SUPERVISED if args.attention else "not supervised",
        "quality": card.read_text() if card.exists() and not args.variant else "not measured yet",
    }  # fmt: skip
    out = HERE / "weights" / ("_".join(filter(None, ("attune_demo", args.variant))) + ".safetensors")
    out.parent.mkdir(exist_ok=True)
    save_file(tensors, out, metadata=about)
    log.info("wrote %s, %.1f MB: %s", out.name, out.stat().st_size / 1e6, json.dumps(about)[:300])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("autoencoder", "unet", "decoder", "export", "adapter"))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=16000, help="scenes drawn at a time")
    parser.add_argument("--chapter-steps", type=int, default=2500, help="steps before new ones are drawn")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--flat", type=float, default=0.35, help="share of this call before the rate falls to 0")
    parser.add_argument("--high-noise-steps", type=int, default=1500, help="first steps that favour noisy times")
    parser.add_argument("--offset", type=float, default=0.1, help="offset noise after the first steps")
    parser.add_argument("--attention", type=float, default=0.02, help="weight of the attention loss")
    parser.add_argument("--fresh", action="store_true", help="start the UNet anew, not from the shipped weights")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--sheet-steps", type=int, default=1000, help="steps between sample sheets")
    parser.add_argument("--variant", default="", help="a folder in demo/run/ for a model of its own")
    parser.add_argument("--made-by", help="the commands that made the weights, for the file's metadata")
    args = parser.parse_args()
    global RUN
    RUN = RUN / args.variant
    RUN.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(RUN / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers, force=True)
    if args.stage == "unet":
        train_unet(args)
    elif args.stage == "export":
        export(args)
    elif args.stage == "adapter":
        train_adapter(args)
    else:
        train_autoencoder(args, decoder_only=args.stage == "decoder")


if __name__ == "__main__":
    main()
