"""Other packs' and stock nodes in one graph with edits: what composes, what is left alone, what is refused. Each row of
the table in README.md is tested here, or through every method by test_contract.py, or over HTTP in tests/server.
"""

import functools
import re

import comfy.controlnet
import comfy.samplers
import comfy_extras.nodes_align_your_steps as align
import comfy_extras.nodes_apg as apg
import comfy_extras.nodes_cfg as cfg
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_freelunch as free
import comfy_extras.nodes_fresca as fresca
import comfy_extras.nodes_hypertile as hypertile
import comfy_extras.nodes_mahiro as mahiro
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_model_downscale as downscale
import comfy_extras.nodes_perpneg as perpneg
import comfy_extras.nodes_sag as sag
import comfy_extras.nodes_tcfg as tcfg
import comfy_extras.nodes_tomesd as tomesd
import pytest
import torch
from comfy.ldm.modules import attention
from comfy_api.torch_helpers import set_torch_compile_wrapper

import nodes as stock
from attune.inversion import host as runs
from attune.nodes.invert import GRIDS, LEVELS, AttuneDDIMInversion
from attune.tests import host

from .bench import METHODS, SOURCE, Bench, adapter, outputs, prompt_swap

# One method for each way of changing a layer, and the only one that changes the prediction.
CHOSEN = ("swap and local blend", "mutual self-attention", "context preserving")


def patched(node, *settings):
    return lambda model: outputs(node, model, *settings)[0]


def split_keys(model):
    """Keys and values for each row by what the host says of the batch, as IP-Adapter packs make them."""

    def attend(q, k, v, options):
        heads, each = options["n_heads"], len(q) // len(options["cond_or_uncond"])
        halves = {0: k.roll(3, 1)[:each], 1: torch.zeros_like(k[:each])}
        image = torch.cat([halves[half] for half in options["cond_or_uncond"]])
        added = attention.optimized_attention(q, image, image, heads)
        return attention.optimized_attention(q, k, v, heads) + 0.3 * added

    model = model.clone()
    model.set_model_attn2_replace(attend, "output", 5)
    return model


# What leaves the picture's tokens as they are: it and the edit both show.
COMPOSE = {
    "FreeU": patched(free.FreeU, 1.3, 1.4, 0.9, 0.2),
    "FreeU_V2": patched(free.FreeU_V2, 1.3, 1.4, 0.9, 0.2),
    "Self-Attention Guidance": patched(sag.SelfAttentionGuidance, 1.0, 2.0),
    "RescaleCFG": patched(advanced.RescaleCFG, 0.9),
    "CFGZeroStar": patched(cfg.CFGZeroStar),
    "TCFG": patched(tcfg.TCFG),
    "APG": patched(apg.APG, 1.0, 2.0, 0.0),
    "FreSca": patched(fresca.FreSca, 1.0, 1.8, 2),
    "Mahiro": patched(mahiro.Mahiro),
    "IP-Adapter": split_keys,
}
# What changes the tokens of some layers: those layers stay plain, and the edit goes on in the others.
RETOKENED = {
    "HyperTile": patched(hypertile.HyperTile, 32, 2, 0, False),
    "ToMe": patched(tomesd.TomePatchModel, 0.5),
    "Deep Shrink": patched(downscale.PatchModelAddDownscale, 3, 2.0, 0.0, 1.0, True, "bicubic", "bicubic"),
}


@pytest.fixture(scope="module")
def bench():
    with torch.inference_mode():
        return Bench(height=8, steps=3)


@pytest.fixture(scope="module")
def known(bench):
    """By a neighbour's and a method's name: pictures to work on, the edit's model and positive, its picture without
    the neighbour, and the picture without either; each once.
    """
    square = bench.like(height=16)

    @functools.cache
    def make(small, method):
        model, positive = METHODS[method](small, 1)
        return small, model, positive, small.sample(model, positive), small.sample(small.model, positive)

    # Self-Attention Guidance finds no grid for two tokens, which is what the smaller picture has in the middle.
    return lambda name, method: make(square if name == "Self-Attention Guidance" else bench, method)


def draw(bench, model, positive):
    """Under a seed of its own: ToMe takes its tokens from the global one, which stock samplers leave as it is."""
    torch.manual_seed(0)
    return bench.sample(model, positive)


def differ(a, b):
    """The greatest difference, as a share of the pictures' own spread."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.std())


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("name", [*COMPOSE, *RETOKENED])
def test_a_neighbour_and_an_edit(name, method, known):
    neighbour = (COMPOSE | RETOKENED)[name]
    bench, model, positive, edited, plain = known(name, method)
    off, _ = METHODS[method](bench, 0)
    without = draw(bench, neighbour(bench.model), positive)
    assert differ(without, plain) > 1e-3, "the neighbour does nothing"
    assert torch.equal(draw(bench, neighbour(off), positive), without), "an edit of strength 0 disturbs it"
    behind = draw(bench, neighbour(model), positive)
    assert differ(behind, without) > 0.05, "the edit does nothing beside it"
    assert differ(behind, edited) > 1e-3, "the neighbour does nothing beside the edit"


@pytest.mark.parametrize("name", [*COMPOSE, *RETOKENED])
def test_either_order_of_the_nodes(name, known):
    neighbour, method = (COMPOSE | RETOKENED)[name], "mutual self-attention"
    bench, model, positive, _, _ = known(name, method)
    before, _ = METHODS[method](bench, 1, model=neighbour(bench.model))
    assert differ(draw(bench, before, positive), draw(bench, neighbour(model), positive)) < 1e-3


# ---- ControlNets of other packs ----------------------------------------------------------------------------------


class Weighted(comfy.controlnet.T2IAdapter):
    """As Advanced-ControlNet does it: a strength for each picture of the batch, each layer and each noise level."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        found = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        pictures = len(x_noisy) // batched_number
        assert pictures * batched_number == len(x_noisy), "rows that the host did not tell of"
        weights = torch.linspace(0.5, 1.5, pictures).repeat(batched_number).view(-1, 1, 1, 1)
        early = 1 + float(t[0])
        layers = ((place, i, x) for place, given in found.items() for i, x in enumerate(given) if x is not None)
        for place, i, x in layers:
            found[place][i] = x.expand(len(x_noisy), -1, -1, -1) * weights * 0.8**i * early
        return found

    def copy(self):
        other = Weighted(self.t2i_model, self.channels_in, self.compression_ratio, self.upscale_algorithm, self.device)
        self.copy_to(other)
        return other


@pytest.mark.parametrize("method", CHOSEN)
def test_a_controlnet_with_weights_of_its_own(method, bench):
    """For two pictures: each gets its own strength, with the edit as without."""
    pair = bench.like(batch=2)
    net = adapter()
    net = Weighted(net.t2i_model, net.channels_in, net.compression_ratio, net.upscale_algorithm, net.device)
    on, positive = METHODS[method](pair, 1)
    off, _ = METHODS[method](pair, 0)
    hint = torch.rand(1, 64, 128, 3)
    steered, negative = outputs(stock.ControlNetApplyAdvanced, positive, pair.away(positive), net, hint, 1.0, 0.0, 1.0)
    conds = {"positive": steered, "negative": negative}
    without = pair.sample(pair.model, **conds)
    assert differ(without, pair.sample(pair.model, positive)) > 0.02, "the net does nothing"
    assert torch.equal(pair.sample(off, **conds), without)
    edited = pair.sample(on, **conds)
    assert differ(edited, without) > 0.05 and differ(edited, pair.sample(on, positive)) > 0.02


# ---- guiders, samplers, schedulers -------------------------------------------------------------------------------


def guided(bench, model, positive, make):
    guider = make(model, positive)
    quiet, euler = outputs(custom.DisableNoise)[0], outputs(custom.KSamplerSelect, "euler")[0]
    return outputs(custom.SamplerCustomAdvanced, quiet, guider, euler, bench.sigmas, bench.noise)[0]["samples"]


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("name", ["Perp-Neg", "Dual CFG", "Basic"])
def test_other_guiders(name, method, bench):
    other, empty = bench.text("a green star on a white background"), bench.text("")
    make = {
        "Perp-Neg": lambda m, p: outputs(perpneg.PerpNegGuider, m, p, other, empty, bench.guidance, 1.0)[0],
        "Dual CFG": lambda m, p: outputs(custom.DualCFGGuider, m, p, other, empty, 4.0, 2.0, "regular")[0],
        "Basic": lambda m, p: outputs(custom.BasicGuider, m, p)[0],
    }[name]
    on, positive = METHODS[method](bench, 1)
    off, _ = METHODS[method](bench, 0)
    without = guided(bench, bench.model, positive, make)
    assert torch.equal(guided(bench, off, positive, make), without)
    assert differ(guided(bench, on, positive, make), without) > 0.05


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_stock_sampler(sampler, bench):
    model, positive = prompt_swap(bench, 1)
    edited, plain = (bench.sample(m, positive, sampler=sampler) for m in (model, bench.model))
    assert edited.shape == bench.noise["samples"].shape
    assert differ(edited, plain) > 0.05


def levels_of(scheduler, model, steps):
    if scheduler == "Align Your Steps":
        return outputs(align.AlignYourStepsScheduler, "SD1", steps, 1.0)[0]
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


@pytest.mark.parametrize("scheduler", [*comfy.samplers.SCHEDULER_NAMES, "Align Your Steps"])
def test_every_stock_scheduler(scheduler, bench):
    """A trajectory is on the levels that it was inverted on: on others its sampler is told so, unless they begin where
    it begins; inverted on them, the picture comes back and is edited there."""
    levels = levels_of(scheduler, bench.model, 6)
    model, positive = prompt_swap(bench, 1)
    if float(levels[0]) > 1.02 * float(bench.sigmas[0]):
        with pytest.raises(ValueError, match="sigmas of the node that made the TRAJECTORY"):
            bench.sample(model, positive, sigmas=levels)
    picture = {"samples": runs.to_host_scale(bench.model, bench.trajectory.latents[-1])}
    settings = (bench.text(SOURCE), 50, GRIDS[0], LEVELS[0], 4)
    trajectory, noise, sigmas = outputs(AttuneDDIMInversion, bench.model, picture, *settings, levels=levels)
    assert torch.equal(sigmas, levels.float()) and trajectory.steps == len(levels) - 1
    drawing = {"latent": noise, "sigmas": sigmas, "guidance": 1.0}
    back = bench.sample(bench.model, bench.text(SOURCE), **drawing)
    lost = (back - picture["samples"]).square().mean() / picture["samples"].var()
    assert lost < 0.25, f"the picture does not come back: {lost:.3f} of its variance is lost"
    model, positive = prompt_swap(bench, 1, trajectory=trajectory)
    same, caption = prompt_swap(bench, 1, trajectory=trajectory, target=SOURCE)
    changed = differ(bench.sample(model, positive, **drawing), back)
    # Under the caption itself an edit changes the picture by what the inversion lost, and by no more.
    assert changed > 0.5 and differ(bench.sample(same, caption, **drawing), back) < 0.2 * changed


@pytest.mark.parametrize("levels", [[], [5.0], [1.0, 5.0, 0.0], [10.0, 5.0, 1.0]], ids=["none", "one", "rising", "cut"])
def test_levels_that_lead_to_no_picture(levels, bench):
    with pytest.raises(ValueError, match="levels that fall from noise to a finished picture; connect"):
        outputs(
            AttuneDDIMInversion, bench.model, bench.noise, bench.text(SOURCE), 5, GRIDS[0], LEVELS[0],
            levels=torch.tensor(levels),
        )  # fmt: skip


def test_a_compiled_model(bench):
    """Traced by the compiler's front and run as it is: the same picture."""
    torch._dynamo.reset()
    model, positive = prompt_swap(bench, 1)
    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert differ(bench.sample(compiled, positive), bench.sample(model, positive)) < 1e-3


# ---- the table ---------------------------------------------------------------------------------------------------

ELSEWHERE = {  # what stands in the table and is tested in another file
    "LoRA": "server/test_neighbours.py", "ControlNet": "engine/test_contract.py",
    "Perturbed-Attention Guidance": "engine/test_contract.py", "EasyCache": "engine/test_contract.py",
    "Inpainting mask": "engine/test_contract.py", "Conditioning (Combine)": "engine/test_contract.py",
    "Context Windows": "engine/test_pictures.py", "Tiled Diffusion and other tiled samplers": "engine/test_pictures.py",
    "packs that run the UNet on one row after another": "engine/test_pictures.py",
    "NegPip and other patches that change the length of texts": "engine/test_same_model.py",
}  # fmt: skip
HERE = {
    *COMPOSE, *RETOKENED, "Advanced-ControlNet", "Perp-Neg", "Dual CFG", "stock samplers", "stock schedulers",
    "torch.compile",
}  # fmt: skip


def test_the_readmes_table_has_a_test_for_each_line():
    text = (host.ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (?:composes|in part|refused)", text, re.M)
    names = {name.strip() for row in rows for name in row.split(", ")}
    assert names == HERE | set(ELSEWHERE)
