"""MaSaFusion on the demo model, beside its equations written down plainly: one UNet row at a time, nothing shared."""

import contextlib
from dataclasses import replace

import comfy.model_management
import numpy as np
import pytest
import torch
from comfy.model_management import InterruptProcessingException

import nodes as stock
from attune.attention_patches import host as patches
from attune.attention_patches import masked_fusion as fusion
from attune.demo import scenes
from attune.inversion import host as runs
from attune.inversion.turns import Turn, Turns
from attune.nodes.demo import AttuneDemoCheckpoint
from attune.nodes.fusion import (
    NOISES,
    AttuneIntermediate,
    AttuneMaskedFusion,
    AttuneNextTurn,
    AttuneSketch,
    AttuneSourceFusion,
)
from attune.nodes.invert import GRIDS, LEVELS, AttuneDDIMInversion, AttuneRecordTrajectory
from attune.nodes.trajectory import AttuneLoadTrajectory, AttuneSaveTrajectory

from .bench import SOURCE, TARGET, Bench, adapter, context_preserving, mutual, outputs, prompt_swap

STEPS = 4
LAYERS = [
    *(("input", n) for n in (1, 2, 4, 5, 7, 8)), ("middle", 0), *(("output", n) for n in range(3, 12))
]  # fmt: skip
GUIDANCE = 3.0
CLOSE = 1e-4  # in fp32; the fusion itself changes the picture by several spreads
WHITE = torch.ones(1, 128, 128)
DEFAULT = (0.08, 1.0, 10)
ALL = (0.0, 1.0, 0)
SOME = (0.25, 0.75, 3)


def rectangle(top, bottom, left, right, height=128, width=128):
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


MASK = rectangle(25, 99, 40, 110)
SMALL = rectangle(13, 50, 20, 55, 64, 64)


def a_hint(seed, height=128, width=128):
    """Some lines, white on black."""
    lines = torch.rand(1, height // 8, width // 8, generator=torch.Generator().manual_seed(seed)) > 0.8
    return lines.float().repeat_interleave(8, 1).repeat_interleave(8, 2)[..., None].repeat(1, 1, 1, 3)


class Picture(Bench):
    """A drawn scene, inverted under its caption."""

    def __init__(self, height=128, width=128, steps=STEPS, pictures=1, mask=MASK):
        self.model, self.clip, self.vae = outputs(AttuneDemoCheckpoint)
        self.guidance = GUIDANCE
        drawn = [
            scenes.render(scenes.scene_from_caption(SOURCE, np.random.default_rng(3 + i)))[0] for i in range(pictures)
        ]
        image = torch.from_numpy(np.stack(drawn)).movedim(-1, 1)
        self.image = torch.nn.functional.interpolate(image, (height, width)).movedim(1, -1)
        latent = outputs(stock.VAEEncode, self.vae, self.image)[0]
        made = outputs(AttuneDDIMInversion, self.model, latent, self.text(SOURCE), steps, GRIDS[0], LEVELS[0])
        self.trajectory, self.noise, self.sigmas = made
        self.target, self.empty = self.text(TARGET), self.text("")
        self.control, self.hint, self.seed, self.mask = adapter(1), a_hint(1, height, width), 4, mask

    def intermediate(self, window=DEFAULT, **changes):
        """The intermediate TRAJECTORY and its picture."""
        settings = {
            "model": self.model, "trajectory": self.trajectory, "target": self.target, "negative": self.empty,
            "control_net": self.control, "hint": self.hint, "mask": self.mask, "vae": self.vae, "seed": self.seed,
            "guidance": GUIDANCE, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "halves": "both",
            "start_noise": NOISES[0],
        }  # fmt: skip
        return outputs(AttuneIntermediate, **settings | stretch(window) | changes)

    def masked_fusion(self, intermediate, window=DEFAULT, **changes):
        settings = {"model": self.model, "trajectory": self.trajectory, "mask": self.mask}
        return outputs(AttuneMaskedFusion, intermediate=intermediate, **settings | stretch(window) | changes)

    def source_fusion(self, window=DEFAULT, **changes):
        settings = {
            "model": self.model, "trajectory": self.trajectory, "target": self.target, "negative": self.empty,
            "mask": self.mask,
        }  # fmt: skip
        return outputs(AttuneSourceFusion, **settings | stretch(window) | changes)

    def draw(self, made, **changes):
        """What a stock Sampler Custom draws of a fusion node's outputs."""
        model, positive, negative, latent, sigmas = made
        settings = {"latent": latent, "negative": negative, "sigmas": sigmas} | changes
        return self.sample(model, positive, **settings)

    def rows(self, run):
        """What ``run()`` gives, and how many rows each call of the UNet had."""
        seen = []
        handle = self.model.model.diffusion_model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        try:
            return run(), seen
        finally:
            handle.remove()


def stretch(window):
    return dict(zip(("start", "end", "layer"), window, strict=True))


class Led:
    """An intermediate and what its fusion draws."""

    def __init__(self, picture):
        (self.made, self.shown), self.made_rows = picture.rows(picture.intermediate)
        self.fused = picture.masked_fusion(self.made)
        self.drawn, self.drawn_rows = picture.rows(lambda: picture.draw(self.fused))

    @property
    def read(self):
        """What the fusion reads the intermediate under, a conditioning each."""
        spec = self.fused[0].model_options["transformer_options"][patches.KEY]
        return [r.conditioning for r in spec.references if r.name.startswith("intermediate")]


@pytest.fixture(scope="module")
def picture():
    with torch.inference_mode():
        return Picture()


@pytest.fixture(scope="module")
def led(picture):
    with torch.inference_mode():
        return Led(picture)


@pytest.fixture(scope="module")
def small():
    """For what does not hang on the size: three steps of 8x8 latents."""
    with torch.inference_mode():
        return Picture(64, 64, steps=3, mask=SMALL)


@pytest.fixture(scope="module")
def small_led(small):
    with torch.inference_mode():
        return Led(small)


def differ(a, b):
    """The greatest difference, as a share of the pictures' own spread."""
    assert a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.std())


# ---- the method, written down plainly ----------------------------------------------------------------------------


class ByHand:
    """The paper's equations 4, 9, 10 and 14. A picture here is z = sqrt(a) x0 + sqrt(1 - a) eps, as the paper has it;
    ``a`` is 1 / (1 + sigma^2). Nothing of the pack runs but the trajectory's numbers."""

    def __init__(
        self, picture, mask, window, strength=1.0, percents=(0.0, 1.0), halves="both", queries="source's"
    ):  # fmt: skip
        self.unet = picture.model.model.diffusion_model
        self.sampling = picture.model.get_model_object("model_sampling")
        self.trajectory, self.target, self.empty = picture.trajectory, picture.target, picture.empty
        self.sigmas = [float(s) for s in picture.sigmas]
        self.inside = mask[0].unfold(0, 8, 8).unfold(1, 8, 8).amax((-1, -2)) >= 0.5
        self.start, self.end, self.layer = window
        net, hint = picture.control.t2i_model, picture.hint
        features = net(hint.mean(-1)[:, None])["input"]
        self.features = [None if f is None else f * strength for f in features]
        self.percents, self.halves = [float(self.sampling.percent_to_sigma(p)) for p in percents], halves
        self.outside = {"source's": all_of, "own": keys_and_values}[queries]

    def eps(self, z, sigma, texts, controlled, exchange=None):
        """The noise (R, C, h, w) that the UNet predicts of one ``z`` under R ``texts``, each with the adapter or
        without, and q, k, v at every self-attention; what ``exchange(row, number, q, k, v)`` gives is attended with."""
        kept = {}

        def attend(number, q, k, v, options):
            kept[number] = q, k, v
            if exchange is not None and number >= self.layer:
                rows = (exchange(r, number, *(t[r] for t in (q, k, v))) for r in range(len(texts)))
                q, k, v = (torch.stack(t) for t in zip(*rows, strict=True))
            q, k, v = (t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v))
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

        table = {place: (lambda *a, n=n: attend(n, *a)) for n, place in enumerate(LAYERS)}
        shares = torch.tensor(controlled).float()[:, None, None, None]
        control = {"input": [None if f is None else shares * f for f in self.features]} if any(controlled) else None
        level = self.sampling.timestep(torch.full((len(texts),), sigma)).float()
        options = {"patches_replace": {"attn1": table}}
        z = z.repeat(len(texts), 1, 1, 1)
        return self.unet(z, level, context=torch.cat(texts), control=control, transformer_options=options), kept

    def controlled(self, sigma):
        """Whether the adapter takes part at this noise level, in the positive and in the negative."""
        first, last = self.percents
        return [last <= sigma <= first, last <= sigma <= first and self.halves == "both"]

    def read(self, trajectory, step, texts, controlled=(False, False)):
        """q, k, v of a trajectory at a step, each of two rows: under its positive and under its negative."""
        sigma = self.sigmas[step]
        return self.eps(trajectory.latents[step] / (1 + sigma**2) ** 0.5, sigma, texts, controlled)[1]

    def source(self, step):
        nulls = self.trajectory.nulls
        negative = self.empty[0][0] if nulls is None else nulls[step]
        return self.read(self.trajectory, step, [self.trajectory.conditioning[0][0], negative])

    def way(self, z, predict):
        """The latents in the model's scale, x = z / sqrt(a), of DDIM under ``predict(z, step)``: equation 4."""
        path = []
        for step, (sigma, lower) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            a, b = 1 / (1 + sigma**2), 1 / (1 + lower**2)
            path.append(z / a**0.5)
            clean = (z - (1 - a) ** 0.5 * predict(z, step)) / a**0.5
            eps = (z - a**0.5 * clean) / (1 - a) ** 0.5
            z = b**0.5 * clean + (1 - b) ** 0.5 * eps
        return torch.stack([*path, z])

    def both(self, z, step, controlled, outside, inside):
        """The prediction under guidance, source prompt outside and target prompt inside; ``outside`` and ``inside``
        say what is exchanged there, of (row, number, q, k, v), or are None."""
        acts = int(self.start * STEPS + 1e-6) <= step < int(self.end * STEPS + 1e-6)

        def exchange(row, number, *own):
            one = (outside, outside, inside, inside)[row]
            return own if one is None else one(row % 2, number, *own)

        source, target, empty = (one[0][0] for one in (self.trajectory.conditioning, self.target, self.empty))
        found, _ = self.eps(
            z, self.sigmas[step], [source, empty, target, empty], 2 * controlled, exchange if acts else None
        )
        outside, inside = (found[i + 1] + GUIDANCE * (found[i] - found[i + 1]) for i in (0, 2))
        return torch.where(self.inside, inside, outside)[None]

    def intermediate(self, noise):
        """Equation 9, from this noise in the model's scale."""

        def predict(z, step):
            source = self.source(step)
            return self.both(z, step, self.controlled(self.sigmas[step]), self.outside(source), None)

        return self.way(noise / (1 + self.sigmas[0] ** 2) ** 0.5, predict)

    def fused(self, intermediate):
        """Equation 10, from the source's noise outside and the intermediate's inside."""

        def predict(z, step):
            controlled, texts = self.controlled(self.sigmas[step]), [self.target[0][0], self.empty[0][0]]
            form = self.read(intermediate, step, texts, controlled)
            return self.both(z, step, controlled, self.outside(self.source(step)), same_map(form))

        noise = torch.where(self.inside, intermediate.latents[0], self.trajectory.latents[0])
        return self.way(noise / (1 + self.sigmas[0] ** 2) ** 0.5, predict)

    def source_fused(self):
        """Equation 14 and algorithm 5."""

        def predict(z, step):
            source = self.source(step)
            return self.both(z, step, [False, False], self.outside(source), keys_and_values(source))

        return self.way(self.trajectory.latents[0] / (1 + self.sigmas[0] ** 2) ** 0.5, predict)


def all_of(read):
    """Attention(Q read, K read, V read)."""
    return lambda half, number, q, k, v: tuple(t[half] for t in read[number])


def keys_and_values(read):
    """Attention(Q own, K read, V read)."""
    return lambda half, number, q, k, v: (q, read[number][1][half], read[number][2][half])


def same_map(read):
    """Attention(Q read, K read, V own)."""
    return lambda half, number, q, k, v: (read[number][0][half], read[number][1][half], v)


def with_nulls(picture):
    """A copy whose trajectory has something in the negative's place at each step, as null-text inversion leaves it."""
    trajectory = picture.trajectory
    noise = torch.randn(STEPS, *picture.empty[0][0].shape, generator=torch.Generator().manual_seed(5))
    nulls = picture.empty[0][0] + 0.5 * noise * picture.empty[0][0].std()
    learned = replace(
        trajectory, negative=picture.empty, nulls=nulls, windows=runs.windows(picture.model, trajectory.sigmas)
    )
    return picture.but(trajectory=learned)


CASES = {
    "the defaults": (DEFAULT, {}, False),
    "all layers and steps, positive only, adapter in the middle": (
        ALL,
        {"halves": "positive only", "start_percent": 0.3, "end_percent": 0.8, "strength": 0.6},
        False,
    ),
    "some layers and steps, no adapter, null embeddings": (SOME, {"strength": 0.0}, True),
    "own queries": (DEFAULT, {"queries": "own"}, False),
}


@pytest.mark.parametrize("window, changes, learned", CASES.values(), ids=CASES)
def test_it_is_the_papers_equations(picture, led, window, changes, learned):
    """Null embeddings hold for the source alone; the target's negative is the plain one."""
    one = with_nulls(picture) if learned else picture
    made, shown = one.intermediate(window, **changes) if changes else (led.made, led.shown)
    percents = changes.get("start_percent", 0.0), changes.get("end_percent", 1.0)
    told = {name: changes[name] for name in ("strength", "halves", "queries") if name in changes}
    by_hand = ByHand(one, MASK, window, percents=percents, **told)
    assert differ(made.latents, by_hand.intermediate(made.latents[0])) < CLOSE
    assert torch.equal(shown, one.vae.decode(runs.host_latent(made, -1))) and made.steps == STEPS
    told = {"queries": changes["queries"]} if "queries" in changes else {}
    drawn = one.draw(one.masked_fusion(made, window, **told)) if changes else led.drawn
    drawn = runs.to_model_scale(one.model, drawn)
    assert differ(drawn, by_hand.fused(made)[-1]) < CLOSE
    assert differ(drawn, made.latents[-1]) > 0.1, "the intermediate is the picture"


@pytest.mark.parametrize("queries", ["source's", "own"])
@pytest.mark.parametrize("window, mask", [(SOME, None), (DEFAULT, MASK)], ids=["whole picture", "mask"])
def test_source_fusion_is_appendix_c(picture, window, mask, queries):
    """Equation 13 keeps the row's own queries; whose it is can be chosen for the outside alone."""
    drawn = runs.to_model_scale(picture.model, picture.draw(picture.source_fusion(window, mask=mask, queries=queries)))
    by_hand = ByHand(picture, WHITE if mask is None else mask, window, queries=queries)
    assert differ(drawn, by_hand.source_fused()[-1]) < CLOSE
    if mask is not None:
        other = ByHand(picture, mask, window, queries="own" if queries != "own" else "source's")
        assert differ(drawn, other.source_fused()[-1]) > 100 * CLOSE


@pytest.mark.parametrize("queries", ["source's", "own"])
def test_whose_queries_is_the_outsides_alone(small, queries):
    """A mask that is white everywhere leaves no outside, and one that is nearly black nearly nothing else."""
    white = small.draw(small.source_fusion(ALL, mask=torch.ones_like(SMALL), queries=queries))
    assert torch.equal(white, small.draw(small.source_fusion(ALL, mask=torch.ones_like(SMALL))))


def test_a_graph_from_before_the_choice_draws_the_pages_form(small, small_led):
    """`queries` may be lacking, and is then the source's."""
    drawn = [small.draw(small.masked_fusion(small_led.made, **told)) for told in ({}, {"queries": "source's"})]
    assert torch.equal(*drawn) and torch.equal(drawn[0], small_led.drawn)
    assert differ(small.draw(small.masked_fusion(small_led.made, queries="own")), drawn[0]) > 1e-3


# ---- beside the stock run ----------------------------------------------------------------------------------------

RUNS = {
    "both": {},
    "positive only": {"halves": "positive only"},
    "from and until, another size": {"start_percent": 0.3, "end_percent": 0.8, "hint": a_hint(1, 72, 200)},
    "strength 0": {"strength": 0.0},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_under_a_full_mask_it_is_the_stock_run_with_the_adapter(picture, changes):
    """From the same seed: what KSampler draws behind Apply ControlNet."""
    made, shown = picture.intermediate(mask=WHITE, **changes)
    inputs = {"hint": picture.hint, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0} | changes
    share = (inputs[name] for name in ("hint", "strength", "start_percent", "end_percent"))
    positive, negative = outputs(stock.ControlNetApplyAdvanced, picture.target, picture.empty, picture.control, *share)
    negative = picture.empty if "halves" in changes else negative
    nothing = {"samples": torch.zeros_like(picture.noise["samples"])}
    drawn = outputs(
        stock.KSampler, picture.model, picture.seed, STEPS, GUIDANCE, "euler", "ddim_uniform", positive, negative,
        nothing, 1.0,
    )[0]["samples"]  # fmt: skip
    assert differ(runs.host_latent(made, -1), drawn) < 1e-4
    assert torch.allclose(shown, picture.vae.decode(drawn), atol=1e-4)


def test_the_adapters_settings_show(small):
    """Each of them is a picture of its own; without strength the adapter is not even asked."""
    asked = []
    handle = small.control.t2i_model.register_forward_pre_hook(lambda *_: asked.append(1))
    settings = [*RUNS.values(), {"hint": a_hint(2, 64, 64)}, {"strength": 0.5}]
    try:
        for one in settings:
            asked.clear()
            made = small.intermediate(mask=torch.ones(1, 64, 64), **one)[0]
            one["ends"] = made.latents[-1]
            assert bool(asked) == (one.get("strength") != 0)
            assert any("control" in extras for _, extras in made.conditioning) == bool(asked)
    finally:
        handle.remove()
        ends = [one.pop("ends") for one in settings]
    assert min(differ(a, b) for n, a in enumerate(ends) for b in ends[:n]) > 0.02


def test_start_noises(small, small_led):
    mixed, inverted = (small.intermediate((1, 1, 0), start_noise=k)[0] for k in (fusion.MIXED, fusion.INVERTED))
    inside, source = fusion.region(SMALL, (8, 8))[0] > 0, small.trajectory.noise
    assert torch.allclose(inverted.noise, source, atol=1e-5)
    assert torch.allclose(mixed.noise[..., inside], small_led.made.noise[..., inside], atol=1e-5)
    assert torch.allclose(mixed.noise[..., ~inside], source[..., ~inside], atol=1e-5)
    assert (small_led.made.noise - source)[..., inside].abs().max() > 1


# ---- rows --------------------------------------------------------------------------------------------------------


def test_rows_a_step(small, small_led):
    """Both halves of what is drawn, outside and inside, and both halves of what is read."""
    assert sum(small_led.made_rows) == (4 + 2) * 3 and sum(small_led.drawn_rows) == (4 + 2 + 2) * 3
    assert sum(small.rows(lambda: small.draw(small.source_fusion()))[1]) == (4 + 2) * 3


@pytest.mark.parametrize(
    "mask, window, made, drawn, alone",
    [
        (SMALL, (0.5, 0.5, 0), 4 * 3, 4 * 3, 4 * 3),
        (torch.ones(1, 64, 64), DEFAULT, 2 * 3, (2 + 2) * 3, (2 + 2) * 3),
        (rectangle(0, 64, 0, 8, 64, 64), (0.34, 0.67, 0), 4 * 3 + 2, 4 * 3 + 4, 4 * 3 + 2),
    ],
    ids=["no window", "a full mask", "one step of three"],
)
def test_fewer_rows(small, mask, window, made, drawn, alone):
    """What is read is run in the steps that read it, and a part without a pixel is not drawn."""
    (intermediate, _), rows = small.rows(lambda: small.intermediate(window, mask=mask))
    assert sum(rows) == made
    fused = small.masked_fusion(intermediate, window, mask=mask)
    assert sum(small.rows(lambda: small.draw(fused))[1]) == drawn
    fused = small.source_fusion(window, mask=mask)
    assert sum(small.rows(lambda: small.draw(fused))[1]) == alone


def test_a_window_of_nothing_is_the_plain_run(small):
    made = small.source_fusion((0.4, 0.4, 0))
    assert torch.equal(small.draw(made), small.draw((small.model, *made[1:])))


# ---- runs leave nothing behind -----------------------------------------------------------------------------------


def test_nothing_stays_of_a_run(small, small_led):
    """Two hints in a row and the first again, on one CONTROL_NET and one MODEL, to the last bit."""
    plain = small.sample(small.model, small.target)
    other, _ = small.intermediate(hint=a_hint(2, 64, 64))
    assert differ(other.latents[-1], small_led.made.latents[-1]) > 0.05
    assert differ(small.draw(small.masked_fusion(other)), small_led.drawn) > 0.01
    assert torch.equal(small.draw(small_led.fused), small_led.drawn)
    again, shown = small.intermediate()
    assert torch.equal(again.latents, small_led.made.latents) and torch.equal(shown, small_led.shown)
    assert torch.equal(small.draw(small.masked_fusion(again)), small_led.drawn)
    assert torch.equal(small.sample(small.model, small.target), plain)
    assert patches.KEY not in small.model.model_options["transformer_options"]
    assert small.control.cond_hint_original is None, "the CONTROL_NET that came in has a hint"


def controls_of(*conditionings):
    found = [extras["control"] for one in conditionings for _, extras in one if "control" in extras]
    return list({id(control): control for control in found}.values())


def test_controls_are_cleaned(small, small_led):
    """Also those that only the references are read under: a hint and its features are no small thing to keep."""
    made, fused = small_led.made, small_led.fused
    # One that is kept, one that is drawn under in all four parts, and two that are read under.
    controls = controls_of(made.conditioning, made.negative, *fused[1:3], *small_led.read)
    assert len(controls) == 4 and len({id(control.t2i_model) for control in controls}) == 1
    hints = []

    def look(*_):
        hints.append([control.cond_hint is not None for control in controls])

    handle = small.model.model.diffusion_model.register_forward_pre_hook(look)
    try:
        small.draw(fused)
    finally:
        handle.remove()
    assert [any(seen) for seen in zip(*hints, strict=True)] == [False, True, True, True]
    assert all(control.cond_hint is None and control.timestep_range is None for control in controls)


def cancelled(picture, call, run):
    calls = []

    def cancel(_, args):
        calls.append(args)
        if len(calls) == call:
            comfy.model_management.interrupt_current_processing()

    handle = picture.model.model.diffusion_model.register_forward_pre_hook(cancel)
    try:
        with pytest.raises(InterruptProcessingException):
            run()
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) <= call + 5


@pytest.mark.usefixtures("server_progress")
def test_cancel_leaves_nothing_behind(small, small_led):
    cancelled(small, 4, small.intermediate)
    cancelled(small, 7, lambda: small.draw(small_led.fused))
    # Those that are drawn under are the host's to clean, which it does when they are used again.
    assert all(control.cond_hint is None for control in controls_of(*small_led.read))
    assert patches.RUN not in small_led.fused[0].model_options["transformer_options"]
    assert torch.equal(small.draw(small_led.fused), small_led.drawn)
    assert torch.equal(small.intermediate()[0].latents, small_led.made.latents)


# ---- other shapes and ways to run --------------------------------------------------------------------------------


def test_two_pictures_are_each_alone():
    """A batch of sources, of hints and of masks."""
    both = Picture(64, 64, steps=2, pictures=2, mask=torch.cat([SMALL, rectangle(0, 30, 0, 64, 64, 64)]))
    both.hint = torch.cat([a_hint(1, 64, 64), a_hint(2, 64, 64)])
    made, _ = both.intermediate()
    drawn, alone = both.draw(both.masked_fusion(made)), both.draw(both.source_fusion())
    for i in range(2):
        trajectory = replace(both.trajectory, latents=both.trajectory.latents[:, i : i + 1])
        one = both.but(trajectory=trajectory, hint=both.hint[i : i + 1], mask=both.mask[i : i + 1])
        led = outputs(stock.ControlNetApplyAdvanced, one.target, one.empty, one.control, one.hint, 1.0, 0.0, 1.0)
        header = {**made.header, "source": None}
        mine = replace(made, latents=made.latents[:, i : i + 1], header=header, conditioning=led[0], negative=led[1])
        assert differ(one.draw(one.masked_fusion(mine)), drawn[i : i + 1]) < 2e-3
        assert differ(one.draw(one.source_fusion()), alone[i : i + 1]) < 2e-3
        if i == 0:  # the second's noise has no seed of its own
            assert differ(one.intermediate()[0].latents, made.latents[:, :1]) < 2e-3
    assert differ(drawn[:1], drawn[1:]) > 0.1


def test_other_sizes():
    """A picture that is neither square nor of even latents."""
    odd = Picture(136, 88, steps=2, mask=rectangle(30, 90, 20, 60, 136, 88))
    led = Led(odd)
    assert led.made.latents.shape == (3, 1, 4, 17, 11) and led.shown.shape == (1, 136, 88, 3)
    assert led.drawn.shape == (1, 4, 17, 11)
    assert differ(led.drawn, odd.draw(odd.source_fusion())) > 0.02


@pytest.mark.parametrize("halves", ["both", "positive only"])
def test_row_by_row_it_is_the_same(small, small_led, monkeypatch, halves):
    """On little memory the host runs the conditionings one by one."""
    made = small_led.made if halves == "both" else small.intermediate(halves=halves)[0]
    drawn = small_led.drawn if halves == "both" else small.draw(small.masked_fusion(made))
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda *a, **k: (0, 0) if k.get("torch_free_too") else 0
    )
    (split, _), rows = small.rows(lambda: small.intermediate(halves=halves))
    again, more = small.rows(lambda: small.draw(small.masked_fusion(made)))
    assert max(rows + more) == 1, "the host did not split"
    assert differ(split.latents, made.latents) < 1e-3 and differ(again, drawn) < 1e-3


def test_half_precision(small, small_led):
    """In bf16, within the grain that a plain run has there."""
    half = small.model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    grain = (small.sample(half, small.target) - small.sample(small.model, small.target)).abs().mean()
    made, _ = small.intermediate(model=half)
    drawn = small.draw(small.masked_fusion(small_led.made, model=half))
    for rough, exact in (
        (runs.host_latent(made, -1), runs.host_latent(small_led.made, -1)),
        (drawn, small_led.drawn),
    ):
        assert (rough - exact).abs().mean() < 4 * grain + 0.02 * exact.std()


def test_another_sampler_and_no_guidance(small, small_led):
    """dpmpp_2m on other noise levels reads the references between their own; without guidance there is no negative."""
    levels = torch.cat([small.sigmas[:1], small.sigmas[1:-1] * 0.8, small.sigmas[-1:]])
    settings = {"sampler": "dpmpp_2m", "sigmas": levels}
    between = small.draw(small_led.fused, **settings)
    plain = small.draw((small.model, *small_led.fused[1:]), **settings)
    assert differ(between, plain) > 0.01 and abs(between.std() / plain.std() - 1) < 0.5
    bare, rows = small.rows(lambda: small.draw(small_led.fused, guidance=1.0))
    assert differ(bare, small_led.drawn) > 0.05
    assert sum(rows) <= (2 + 4) * 3


# ---- wiring ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def refused(match):
    """One ValueError of one sentence, which says ``match``."""
    with pytest.raises(ValueError, match=match) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and text[:-1].count(". ") == 0, text


def test_other_conditionings_than_the_nodes_are_refused(small, small_led):
    model, positive, negative, latent, sigmas = small_led.fused
    wired = "positive and negative outputs of the same Attune fusion node"
    for others in ({"negative": small.empty}, {"negative": negative[:1]}, {"negative": []}):
        with refused(wired):
            small.draw(small_led.fused, **others)
    for others in (small.target, positive[:1]):
        with refused(wired):
            small.draw((model, others, negative, latent, sigmas))
    assert torch.equal(small.draw(small_led.fused), small_led.drawn)


@pytest.mark.parametrize("channels, xl", [([320, 640, 1280, 1280], False), ([64, 128, 256, 256], True)], ids=str)
def test_adapters_of_other_families_are_refused(small, channels, xl):
    with refused("T2I-Adapter of widths .* Attune Intermediate"):
        small.intermediate(control_net=adapter(channels=channels, xl=xl))


def test_a_pair_that_does_not_fit_is_refused(small, small_led):
    made = small_led.made
    for other, match in (
        (replace(made, sigmas=made.sigmas[1:], latents=made.latents[1:]), "the intermediate has 2 steps"),
        (replace(made, sigmas=made.sigmas * 0.9), "make the intermediate with Attune Intermediate"),
        (replace(made, latents=made.latents.repeat(1, 2, 1, 1, 1)), "for 2 pictures"),
        (replace(made, negative=[]), "without a target or a negative"),
        (replace(made, header={**made.header, "source": "another"}), "another source"),
    ):
        with refused(match):
            small.masked_fusion(other)


def test_an_intermediate_is_saved_by_no_file(small_led, tmp_path):
    """Without its adapter it would be read as something else."""
    with refused("control"):
        outputs(AttuneSaveTrajectory, small_led.made, f"attune/{tmp_path.name}")


def test_masks_that_cannot_be(small, small_led):
    for run in (small.intermediate, lambda mask: small.masked_fusion(small_led.made, mask=mask), small.source_fusion):
        with refused("black, so it marks no place"):
            run(mask=torch.zeros(1, 64, 64))
        with refused("3 masks, but the TRAJECTORY holds 1 pictures"):
            run(mask=SMALL.repeat(3, 1, 1))


def test_settings_that_cannot_be(small):
    for changes, match in (
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent to end_percent is 0.8 to 0.2"),
        ({"start": 0.8, "end": 0.2}, "start to end is 0.8 to 0.2"),
        ({"layer": 16}, "16 layers"),
        ({"halves": "none"}, 'The input halves of Attune Intermediate is "none"'),
        ({"start_noise": "white"}, 'The input start_noise of Attune Intermediate is "white"'),
    ):
        with refused(match):
            small.intermediate(**changes)


def test_a_source_without_text_needs_one(small):
    bare = small.but(trajectory=replace(small.trajectory, conditioning=[]))
    with refused("holds no conditioning, but Attune Source Fusion needs"):
        bare.source_fusion()
    given = bare.draw(bare.source_fusion(source=small.text(SOURCE)))
    assert torch.equal(given, small.draw(small.source_fusion()))


def test_a_second_edit_on_the_model(small, small_led):
    """A second fusion reads other runs under the same names, and edits of words find no prompt of theirs."""
    edited = small_led.fused[0]
    for again in (
        lambda: small.masked_fusion(small_led.made, model=edited),
        lambda: small.source_fusion(model=edited),
        lambda: small.intermediate((1.0, 1.0, 10), model=edited),
    ):
        with refused("carries an Attune edit"):
            again()
    for edit in (prompt_swap, mutual, context_preserving):
        with pytest.raises(ValueError, match="connect|share one TRAJECTORY"):
            model, positive = edit(small, 1, small_led.fused[0])
            small.draw((model, positive, *small_led.fused[2:]))


def test_a_recorded_fusion_is_the_samplers_to_the_bit(small):
    model, positive, negative, latent, sigmas = made = small.source_fusion()
    recorded = outputs(
        AttuneRecordTrajectory, model, False, 0, GUIDANCE, positive, negative, runs.euler(), sigmas, latent
    )[1]["samples"]
    assert torch.equal(recorded, small.draw(made))


# ---- turns -------------------------------------------------------------------------------------------------------

TURNS = [
    ("a yellow circle and a blue square on a gray background", rectangle(10, 30, 10, 30, 64, 64)),
    ("a yellow star and a blue square on a gray background", rectangle(25, 50, 8, 40, 64, 64)),
    ("a yellow star and a green square on a gray background", rectangle(45, 64, 32, 64, 64, 64)),
]


def test_three_turns(small, tmp_path):
    """Pixels that no mask touched are the first picture's to the last bit, and each turn starts where one ended."""
    trajectory, turns, touched = small.trajectory, None, torch.zeros(1, 64, 64)
    for number, (prompt, mask) in enumerate(TURNS):
        turn = small.but(trajectory=trajectory, target=small.text(prompt), mask=mask)
        # One of them is led by a sketch.
        made = turn.masked_fusion(turn.intermediate()[0]) if number == 1 else turn.source_fusion()
        model, positive, negative, latent, sigmas = made
        arguments = positive, negative, runs.euler(), sigmas, latent
        edited, drawn, *_ = outputs(AttuneRecordTrajectory, model, False, 0, GUIDANCE, *arguments)
        assert differ(drawn["samples"], turn.draw(made)) < 1e-4
        before = trajectory
        trajectory, shown, turns, history = outputs(
            AttuneNextTurn, before, edited, mask, small.image, small.vae, 4, turns
        )
        touched = torch.maximum(touched, mask)
        outside, mine = touched[0] == 0, mask[0] > 0
        assert torch.equal(shown[0][outside], small.image[0][outside])
        assert (shown - small.image)[0][mine].abs().max() > 0.05
        inside = fusion.region(mask, (8, 8))[0] > 0
        assert torch.equal(trajectory.latents[..., ~inside], before.latents[..., ~inside])
        assert torch.equal(trajectory.latents[..., inside], edited.latents[..., inside])
        assert torch.equal(trajectory.conditioning[0][0], turn.target[0][0])
        assert torch.equal(trajectory.negative[0][0], small.empty[0][0])
        assert len(trajectory.conditioning) == len(trajectory.negative) == 1
        assert all(set(extras) <= {"pooled_output"} for _, extras in trajectory.conditioning + trajectory.negative)
    lines = history.splitlines()
    assert [line[:3] for line in lines] == ["1. ", "2. ", "3. "]
    assert f"seed {small.seed}" in lines[1] and "seed" not in lines[0]
    assert all(f"mask {float(mask.mean()):.0%}" in line for line, (_, mask) in zip(lines, TURNS, strict=True))
    assert torch.equal(turns.touched, touched)
    (name,) = outputs(AttuneSaveTrajectory, trajectory, f"attune/{tmp_path.name}")
    loaded = outputs(AttuneLoadTrajectory, name)[0]
    assert torch.equal(loaded.latents, trajectory.latents) and loaded.header["method"] == "turn"
    assert torch.equal(loaded.conditioning[0][0], trajectory.conditioning[0][0])
    again = small.but(trajectory=loaded)
    assert torch.equal(again.draw(again.source_fusion()), again.but(trajectory=trajectory).draw(again.source_fusion()))


def test_turns_of_other_pictures_are_refused(small):
    other = replace(small.trajectory, sigmas=small.trajectory.sigmas * 0.9)
    with refused("Attune Next Turn"):
        outputs(AttuneNextTurn, small.trajectory, other, SMALL, small.image, small.vae, 4)
    wide = Turns((Turn("x", 1, 0.5),), torch.ones(1, 128, 128))
    with refused("The picture is 64x64, but the turns are of one of 128x128"):
        outputs(AttuneNextTurn, small.trajectory, small.trajectory, SMALL, small.image, small.vae, 4, wide)


def test_a_sketch_is_wiped_and_drawn_on(picture):
    plain = outputs(AttuneSketch, picture.image, 0.2, 1.0, 2)[0]
    assert plain.shape == (1, 128, 128, 3) and 0.005 < plain.mean() < 0.2
    assert torch.equal(plain[..., 0], plain[..., 1]) and torch.equal(plain[..., 0], plain[..., 2])
    assert not outputs(AttuneSketch, picture.image, 0.2, 1.0, 2, erase=WHITE)[0].any()
    stroke = rectangle(40, 42, 50, 90)
    drawn = outputs(AttuneSketch, picture.image, 0.2, 1.0, 2, erase=MASK, draw=stroke)[0][..., 0]
    assert torch.equal(drawn[MASK < 0.5], plain[..., 0][MASK < 0.5])
    assert torch.equal(drawn[MASK > 0.5], stroke[MASK > 0.5])
    with refused("erase holds 2 masks"):
        outputs(AttuneSketch, picture.image, 0.2, 1.0, 2, erase=WHITE.repeat(2, 1, 1))
