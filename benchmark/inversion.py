"""Quality, speed and faithfulness of the inversions, on the demo model. Run through ``python3 dev.py bench``.

    dev.py bench quality     how well 32 held-out pictures come back at guidance 7.5, by method
    dev.py bench speed       null-text inversion beside a straightforward one: UNet rows, time, memory, where time goes
    dev.py bench parity      beside an independent implementation on diffusers, step by step

Every figure is printed, and kept in benchmark/inversion.json. Times are only ever compared within one run.
"""

import argparse
import contextlib
import functools
import json
import logging
import time
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import torch

from ..demo import model as demo_model
from ..demo import scenes
from ..demo.measure import Bench, call, save
from ..inversion import ddim, gradient, host, null_text
from ..inversion.report import psnr
from ..inversion.trajectory import negative_of
from ..nodes import invert
from . import reference, to_diffusers
from .live import LiveBytes

RESULTS = Path(__file__).parent / "inversion.json"
HALF = "Attune, half the updates at twice the rate"
log = logging.getLogger("attune.bench")


# ---- quality -----------------------------------------------------------------------------------------------------


def quality(bench, batch=8):
    """Mean PSNR in dB against the pictures, and below what the autoencoder alone leaves."""
    drawn, pictures, _ = bench.scenes()
    back = {}
    for first in range(0, len(drawn), batch):
        captions = bench.text(*(scenes.caption(s) for s in drawn[first : first + batch]))
        latent = bench.encode(pictures[first : first + batch])
        back.setdefault("autoencoder", []).append(bench.decode(latent))
        trajectory = bench.invert(latent, captions)[0]
        empty = bench.text("")

        def keep(name, path, back=back, trajectory=trajectory):
            back.setdefault(name, []).append(host.decode(bench.vae, trajectory, path[-1]))

        def draw(trajectory, negative, guidance=bench.guidance):
            return host.draw_again(bench.model, trajectory, negative, guidance)

        keep("DDIM, guidance 1", draw(trajectory, empty, 1.0))
        keep("DDIM", draw(trajectory, empty))
        keep("negative-prompt", draw(*call(invert.AttuneNegativePromptInversion, trajectory)))
        settings = empty, bench.guidance, 10, 0.01, 1e-5, True
        keep("null-text", draw(*call(invert.AttuneNullTextInversion, trajectory, bench.model, *settings)))
        keep("direct", call(invert.AttuneDirectInversion, trajectory, 1, 1.0, bench.guidance)[0].latents)
        log.info("%d of %d pictures", min(first + batch, len(drawn)), len(drawn))
    back = {name: torch.cat(parts) for name, parts in back.items()}
    save("inversions.png", [p for rows in zip(pictures, *back.values(), strict=True) for p in rows][: 7 * 8], 7)
    values = {name: psnr(p, pictures) for name, p in back.items()}
    best = values["autoencoder"]
    return {
        name: {"PSNR dB": round(v, 2), "below the autoencoder dB": round(best - v, 2)} for name, v in values.items()
    }


# ---- speed -------------------------------------------------------------------------------------------------------


def straightforward(settings, denoise, sigmas, latents, null, guidance):
    """Null-text inversion as it is first written down: both branches anew at every update, and all of the updates."""
    levels = [float(s) for s in sigmas]
    x, nulls = latents[0].clone(), []
    embedding = null
    for step, (high, low) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        embedding = embedding.detach().clone().requires_grad_()
        rate = settings.rate * (1 - step / (2 * (len(levels) - 1)))  # to half over the run, whose last level is 0
        optimizer = torch.optim.Adam([embedding], lr=rate)
        for _ in range(settings.inner):
            with torch.enable_grad():
                clean, empty = denoise(x, high, embedding)
                landed = ddim.step_down(x, null_text.guide(clean, empty, guidance), high, low)
                loss = (landed - latents[step + 1]).square().mean() / (1 + low**2)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        with torch.no_grad():
            clean, empty = denoise(x, high, embedding)
            x = ddim.step_down(x, null_text.guide(clean, empty, guidance), high, low)
        nulls.append(embedding.detach())
    return torch.stack(nulls)


class Clock:
    """Rows that the UNet is run on, with and without a graph, and the seconds inside those runs."""

    def __init__(self, unet):
        self.rows = {"no gradient": 0, "with gradient": 0, "computed again": 0}
        self.seconds = dict.fromkeys(self.rows, 0.0)
        self.unet = unet

    @contextlib.contextmanager
    def running(self):
        begun = []

        def kind():
            return "with gradient" if torch.is_grad_enabled() else "no gradient"

        def before(_, args):
            self.rows[kind()] += len(args[0])
            begun.append(time.perf_counter())

        def after(_, args, out):  # not called where a pass ends early, which counts as a whole one
            self.seconds[kind()] += time.perf_counter() - begun.pop()

        handles = [self.unet.register_forward_pre_hook(before), self.unet.register_forward_hook(after)]
        start = time.perf_counter()
        try:
            yield self
        finally:
            self.total = time.perf_counter() - start
            for handle in handles:
                handle.remove()


def speed(bench):
    drawn, pictures, _ = bench.scenes()
    unet = bench.model.model.diffusion_model
    settings = null_text.NullText(bench.guidance)
    empty = bench.text("")
    totals = {}
    for i, scene in enumerate(drawn):
        captions, latent = bench.text(scenes.caption(scene)), bench.encode(pictures[i : i + 1])
        trajectory = bench.invert(latent, captions)[0]

        def slow(trajectory=trajectory, captions=captions):
            return _slow(bench, trajectory, captions, empty, settings)

        def ours(inner, rate, trajectory=trajectory):
            arguments = empty, bench.guidance, inner, rate, settings.tolerance, settings.warm
            return call(invert.AttuneNullTextInversion, trajectory, bench.model, *arguments)[0].nulls

        runs = {
            "straightforward": slow,
            "Attune": functools.partial(ours, settings.inner, settings.rate),
            HALF: functools.partial(ours, settings.inner // 2, settings.rate * 2),
        }
        for name, run in runs.items():
            with Clock(unet).running() as clock:
                nulls = run()
            windows = host.windows(bench.model, trajectory.sigmas)
            learned = replace(trajectory, negative=empty, nulls=nulls, windows=windows)
            path = host.draw_again(bench.model, learned, negative_of(learned), bench.guidance)
            again = host.decode(bench.vae, trajectory, path[-1])
            row = totals.setdefault(name, {"PSNR dB": [], "seconds": [], "rows": [], "gradient rows": [], "shares": []})
            row["PSNR dB"].append(psnr(again, pictures[i : i + 1]))
            row["seconds"].append(clock.total)
            row["rows"].append(sum(clock.rows.values()))
            row["gradient rows"].append(clock.rows["with gradient"])
            inside = {k: v / clock.total for k, v in clock.seconds.items() if v}
            row["shares"].append(inside | {"backward and the rest": 1 - sum(inside.values())})
            log.info("%s, picture %d: %s, %.1f s", name, i + 1, clock.rows, clock.total)
    mean = {n: {k: sum(v) / len(v) for k, v in row.items() if k != "shares"} for n, row in totals.items()}
    shares = totals["Attune"]["shares"]
    where = {k: round(sum(s[k] for s in shares) / len(shares), 2) for k in shares[0]}
    return {
        **{name: {k: round(v, 2) for k, v in row.items() if k != "seconds"} for name, row in mean.items()},
        "times faster": {
            name: round(mean["straightforward"]["seconds"] / mean[name]["seconds"], 2) for name in ("Attune", HALF)
        },
        "where Attune's time goes": where,
        "memory": memory(bench),
    }


def _slow(bench, trajectory, captions, empty, settings):
    """On the bare network: both branches in one call, the whole graph kept, nothing computed again."""
    base, cond = bench.model.model, captions[0][0].clone().float()

    def both(x, sigma, embedding):
        level = torch.full((2,), sigma, device=x.device)
        return base.apply_model(torch.cat([x, x]), level, c_crossattn=torch.cat([cond, embedding])).chunk(2)

    comfy.model_management.load_models_gpu([bench.model])
    with torch.inference_mode(False), torch.no_grad(), gradient.ordinary(base):
        cond, null = cond.clone(), empty[0][0].clone().float()
        latents = trajectory.latents.clone()
        return straightforward(settings, both, trajectory.sigmas, latents, null, bench.guidance)


def memory(bench, side=64):
    """Peak bytes of a null-text update beside a guided sampling step, for one picture of side x side latents."""
    generator = torch.Generator().manual_seed(bench.seed)
    picture = torch.randn(1, 4, side, side, generator=generator)
    text, empty = bench.text("a red circle on a gray background"), bench.text("")
    settings = null_text.NullText(bench.guidance, inner=2, tolerance=0.0)
    sigmas = torch.tensor([2.0, 1.5])
    latents = torch.stack([picture * 2, picture])
    peaks = {}

    def sampling(denoise, start, report):
        denoise(start, 2.0)
        with LiveBytes() as live:
            denoise(start, 2.0)
        peaks["guided sampling step"] = live.peak

    def learning(network, start, report):
        with LiveBytes() as live:
            null = empty[0][0].clone().float()
            for _ in null_text.learn(
                settings, network.denoise, sigmas, latents.to(start), null, null_text.begin(latents), lambda *_: 0
            ):
                pass
        peaks["null-text update"] = live.peak

    host.walk(bench.model, text, picture, sigmas, sampling, empty, bench.guidance)
    host.learn(bench.model, text, empty, picture, 1, learning)
    weights = sum(p.numel() * p.element_size() for p in bench.model.model.diffusion_model.parameters())
    step, update = peaks["guided sampling step"], peaks["null-text update"]
    return {
        "latent": [side, side],
        "activations of a guided step MB": round(step / 1e6, 1),
        "activations of an update MB": round(update / 1e6, 1),
        "ratio of activations": round(update / step, 2),
        "ratio with weights": round((update + weights) / (step + weights), 2),
    }


# ---- parity ------------------------------------------------------------------------------------------------------

GRIDS = {host.HOST_GRID: reference.OFFSET_1, host.PAPERS_GRID: reference.OFFSET_0}
LEVELS = {ddim.LATER: reference.LATER, ddim.CURRENT: reference.CURRENT}


def parity(bench, inner=10):
    """Largest relative differences from the implementation on diffusers, over pictures, steps, grids and levels."""
    drawn, pictures, _ = bench.scenes()
    with torch.inference_mode(False):
        network = to_diffusers.unet(demo_model.read_weights()["unet"])
    out = {"DDIM latents": 0.0, "null-text losses": 0.0, "direct, exact": True, "direct ablation": 0.0}
    for i, scene in enumerate(drawn):
        captions, latent = bench.text(scenes.caption(scene)), bench.encode(pictures[i : i + 1])
        for key, value in compare(bench, network, latent, captions, inner).items():
            out[key] = out[key] and value if isinstance(value, bool) else max(out[key], value)
        log.info("picture %d of %d: %s", i + 1, len(drawn), out)
    return out


def relative(ours, theirs):
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def compare(bench, network, latent, captions, inner):
    """One picture: DDIM on every grid and level, and on each grid null-text and direct inversion."""
    empty = bench.text("")
    with torch.inference_mode(False):
        cond, null = captions[0][0].clone().float(), empty[0][0].clone().float()
    found = {"DDIM latents": 0.0, "null-text losses": 0.0, "direct, exact": True, "direct ablation": 0.0}
    for grid, kind in GRIDS.items():
        for level, where in LEVELS.items():
            trajectory = call(invert.AttuneDDIMInversion, bench.model, latent, captions, bench.steps, grid, level)[0]
            sigmas = trajectory.sigmas
            scale = (1 + sigmas**2).sqrt().view(-1, 1, 1, 1, 1)
            ours = (trajectory.latents / scale).unbind()
            with torch.inference_mode(False):
                # The papers take the picture to be z_0 itself; here it is x at the last noise level.
                _, theirs = reference.ddim_invert(network, kind, ours[-1].clone(), cond, bench.steps, where)
            theirs = theirs[: len(ours)]
            found["DDIM latents"] = max(found["DDIM latents"], *(map(relative, ours, theirs)))
        # On the papers' grid the last step is onto itself; the reference keeps it, and learns nothing there.
        with torch.inference_mode(False):
            path = [z.clone() for z in ours] + [ours[-1].clone()] * (bench.steps + 1 - len(ours))
            _, losses, _ = reference.null_text(network, kind, path, cond, null, bench.guidance, inner, early_stop=False)
            ablated = reference.direct(network, kind, path, cond, null, bench.guidance, 3, 0.5)
        settings = null_text.NullText(bench.guidance, inner=inner, tolerance=-1.0)
        mine = learn_losses(bench, trajectory, captions, empty, settings)
        pairs = [
            (a, b) for mine_, theirs_ in zip(mine, losses, strict=False) for a, b in zip(mine_, theirs_, strict=True)
        ]
        found["null-text losses"] = max(found["null-text losses"], *(abs(a - b) / b for a, b in pairs))
        pinned = call(invert.AttuneDirectInversion, trajectory, 1, 1.0, bench.guidance)[0].latents
        found["direct, exact"] &= torch.equal(pinned, trajectory.latents)
        drawn = call(invert.AttuneDirectInversion, trajectory, 3, 0.5, bench.guidance, bench.model, empty)[0].latents
        pairs = zip((drawn / scale).unbind(), ablated, strict=False)
        found["direct ablation"] = max(found["direct ablation"], *(relative(a, b) for a, b in pairs))
    return found


def learn_losses(bench, trajectory, captions, empty, settings):
    """Null-text inversion's losses, step by step, of a trajectory with one picture."""

    def body(network, start, report):
        latents, null = trajectory.latents.clone().to(start), empty[0][0].clone().float().to(start)
        progress = null_text.begin(latents)
        for now in null_text.learn(settings, network.denoise, trajectory.sigmas, latents, null, progress, lambda *_: 0):
            progress = now
        return [pictures[0] for pictures in progress.losses]

    return host.learn(bench.model, captions, empty, host.host_latent(trajectory, -1), 1, body)


PARTS = {"quality": (quality, 32), "speed": (speed, 4), "parity": (parity, 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int, help="held-out scenes (32 for quality, else 4)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    measure, count = PARTS[args.part]
    count = args.count or count
    settings = {"scenes": count, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    with torch.inference_mode():
        result = settings | measure(Bench(count, args.seed, args.steps, args.guidance))
    log.info("%s: %s", args.part, json.dumps(result, indent=2))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(known | {args.part: result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
