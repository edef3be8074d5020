"""The inversion nodes on real MODELs: what they learn and record, what they leave as it was, what they refuse."""

import gc
import os
import shutil
import threading
import time
import types
from dataclasses import replace

import comfy.conds
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_model_advanced as advanced
import folder_paths
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from safetensors.torch import load_file

import nodes as stock
from attune.attention_patches.host import PROMPT
from attune.demo import model as demo_model
from attune.inversion import host as runs
from attune.inversion import unfinished
from attune.nodes import invert, trajectory
from attune.nodes.demo import AttuneDemoScene
from attune.nodes.edit import AttunePromptSwap

from .bench import SOURCE, TARGET, outputs, overflowing
from .test_nodes import dit, one_sentence

STEPS, GUIDANCE = 5, 7.5
ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture(scope="module")
def image():
    return outputs(AttuneDemoScene, SOURCE, 3, 128)[0]


@pytest.fixture(scope="module")
def latent(bench, image):
    with torch.inference_mode():
        return outputs(stock.VAEEncode, bench.vae, image)[0]


@pytest.fixture
def inverted(bench, latent):
    return ddim(bench, latent)[0]


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The host's folders, away from the ones in use."""
    for name in ("input", "output", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    return tmp_path


def ddim(bench, latent, steps=STEPS, prompt=SOURCE, model=None, **kwargs):
    settings = steps, invert.GRIDS[0], invert.LEVELS[0]
    return outputs(invert.AttuneDDIMInversion, model or bench.model, latent, bench.text(prompt), *settings, **kwargs)


def null_text(bench, inverted, model=None, negative=None, guidance=GUIDANCE, inner=3, rate=0.01, stop=0.0, warm=True):
    negative = negative or bench.text("")
    return outputs(
        invert.AttuneNullTextInversion, inverted, model or bench.model, negative, guidance, inner, rate, stop, warm
    )


def start(inverted):
    return {"samples": runs.host_latent(inverted, 0)}


def distance(a, b):
    return float((a - b).square().mean().sqrt() / b.std())


def model_in(dtype, compute=None):
    """The demo model with weights of another precision."""
    config = comfy.supported_models.SD15({})
    config.unet_config = dict(demo_model.UNET)
    config.set_inference_dtype(dtype, compute)
    model = config.get_model({}, device="cpu")
    model.diffusion_model.load_state_dict(demo_model.read_weights()["unet"])
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


# ---- DDIM --------------------------------------------------------------------------------------------------------


def test_refinement_is_the_exact_inverse_of_the_sampler(bench, latent):
    errors = []
    for refine in (0, 2, 12):
        made, noise, sigmas = ddim(bench, latent, refine=refine)
        back = bench.sample(bench.model, bench.text(SOURCE), latent=noise, sigmas=sigmas, guidance=1.0)
        errors.append(distance(back, latent["samples"]))
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.02


def test_inversion_under_guidance(bench, latent):
    one, _, _ = ddim(bench, latent)
    same, _, _ = ddim(bench, latent, guidance=1.0, negative=bench.text("a star"))
    led, _, sigmas = ddim(bench, latent, guidance=1.5, negative=bench.text(""), refine=8)
    assert torch.equal(one.latents, same.latents)
    settings = {"sigmas": sigmas, "guidance": 1.5}
    back = [bench.sample(bench.model, bench.text(SOURCE), latent=start(made), **settings) for made in (one, led)]
    assert distance(back[1], latent["samples"]) < 0.3 * distance(back[0], latent["samples"])
    with pytest.raises(ValueError) as error:
        ddim(bench, latent, guidance=3.0)
    one_sentence(error, "nothing is connected to negative", "Attune DDIM Inversion")


def test_an_empty_source_prompt(bench, latent):
    assert not torch.equal(ddim(bench, latent, prompt="")[0].noise, ddim(bench, latent)[0].noise)


def test_v_prediction_walks_the_same_way(bench, latent, monkeypatch):
    plain = ddim(bench, latent, steps=5)[0]
    taught = null_text(bench, plain, inner=2)[0]
    model = outputs(advanced.ModelSamplingDiscrete, bench.model, "v_prediction", False)[0]
    unet, sampling = model.model.diffusion_model, model.get_model_object("model_sampling")
    forward = unet.forward

    def speaks_v(x, timesteps=None, *args, **kwargs):
        sigma = sampling.sigma(timesteps).view(-1, 1, 1, 1)
        return forward(x, timesteps, *args, **kwargs) * (1 + sigma**2).sqrt() - x * sigma

    monkeypatch.setattr(unet, "forward", speaks_v)
    made = ddim(bench, latent, model=model)[0]
    assert made.header["prediction"] == "V_PREDICTION"
    assert torch.allclose(made.latents, plain.latents, rtol=1e-3, atol=2e-3)
    learned = null_text(bench, made, model=model, inner=2)[0]
    assert torch.allclose(learned.nulls, taught.nulls, atol=2e-3)


def test_a_caching_pack_skips_nothing(bench, latent):
    import comfy_extras.nodes_easycache as easycache

    cached = outputs(easycache.EasyCacheNode, bench.model, 10.0, 0.0, 1.0, False)[0]
    assert torch.equal(ddim(bench, latent, steps=10, model=cached)[0].latents, ddim(bench, latent, steps=10)[0].latents)


# ---- null-text ---------------------------------------------------------------------------------------------------


def test_null_text_brings_the_picture_back_under_guidance(bench, latent):
    inverted = ddim(bench, latent, steps=10)[0]
    learned, negative = null_text(bench, inverted, guidance=4.0, inner=8, rate=0.05)
    sample = {"latent": start(inverted), "sigmas": inverted.sigmas, "guidance": 4.0}
    plain = bench.sample(bench.model, bench.text(SOURCE), **sample)
    back = bench.sample(bench.model, bench.text(SOURCE), negative=negative, **sample)
    true = runs.host_latent(inverted, -1)
    assert distance(back, true) < 0.5 * distance(plain, true)
    # What the stock sampler draws is what was learned, to rounding.
    drawn = runs.draw_again(bench.model, learned, negative, 4.0)
    assert distance(runs.to_model_scale(bench.model, back), drawn[-1]) < 0.02
    assert learned.nulls.shape == (10, 1, *bench.text("")[0][0].shape[1:]) and learned.nulls.dtype == torch.float32


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "ddim", "uni_pc"])
def test_exactly_one_null_embedding_a_step(bench, inverted, sampler, monkeypatch):
    """Also in samplers that ask twice a step or between the levels."""
    _, negative = null_text(bench, inverted, inner=1)
    assert len(negative) == STEPS and PROMPT not in negative[0][1]
    marked = [[torch.full_like(t, float(i)), extras] for i, (t, extras) in enumerate(negative)]
    used, original = [], comfy.conds.CONDCrossAttn.process_cond

    def watch(self, batch_size, **kwargs):
        if float(self.cond.std()) == 0:
            used.append(int(self.cond.flatten()[0]))
        return original(self, batch_size, **kwargs)

    monkeypatch.setattr(comfy.conds.CONDCrossAttn, "process_cond", watch)
    calls = []
    handle = bench.model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    bench.sample(
        bench.model, bench.text(SOURCE), start(inverted), sampler, GUIDANCE, marked, inverted.sigmas
    )  # fmt: skip
    handle.remove()
    assert sorted(set(used)) == list(range(STEPS)) and used == sorted(used)
    assert len(used) == len(calls)


def test_null_embeddings_in_a_stock_ksampler(bench, inverted):
    _, negative = null_text(bench, inverted)
    euler = bench.sample(
        bench.model, bench.text(SOURCE), start(inverted), "euler", GUIDANCE, negative, inverted.sigmas
    )  # fmt: skip
    k = outputs(
        stock.KSamplerAdvanced, bench.model, "disable", 0, STEPS, GUIDANCE, "euler", "ddim_uniform", bench.text(SOURCE),
        negative, start(inverted), 0, 10000, "disable",
    )[0]["samples"]  # fmt: skip
    assert distance(k, euler) < 1e-3


def test_each_picture_of_a_batch_learns_its_own(bench, latent):
    other = outputs(stock.VAEEncode, bench.vae, outputs(AttuneDemoScene, TARGET, 5, 128)[0])[0]["samples"]
    both = ddim(bench, {"samples": torch.cat([latent["samples"], other])})[0]
    together, negative = null_text(bench, both, inner=4, stop=2e-3)
    assert together.nulls.shape[1] == 2 and negative[0][0].shape[0] == 2
    for i in range(2):
        one = ddim(bench, {"samples": torch.cat([latent["samples"], other])[i : i + 1]})[0]
        alone = null_text(bench, one, inner=4, stop=2e-3)[0]
        assert (alone.nulls[:, 0] - together.nulls[:, i]).abs().max() < 0.02


def test_early_stop_and_cold_start(bench, inverted):
    empty = bench.text("")[0][0]
    calls = []
    handle = bench.model.model.diffusion_model.register_forward_pre_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )
    null_text(bench, inverted, inner=4, stop=1.0)
    # One update, made from the loss that is good enough, then on; each step asks twice more without gradients.
    assert calls == [False, True, False] * STEPS
    calls.clear()
    null_text(bench, inverted, inner=4)
    assert calls == [False, *[True] * 4, False] * STEPS
    handle.remove()
    warm, cold = (null_text(bench, inverted, inner=1, warm=w)[0].nulls for w in (True, False))
    assert torch.equal(warm[0], cold[0]) and not torch.equal(warm[1], cold[1])
    rates = torch.tensor([0.01 * (1 - i / STEPS / 2) for i in range(STEPS)])  # to half, over however many
    # Adam's first update moves every value by the rate, whatever the gradient's size.
    assert torch.allclose((cold - empty).abs().amax((1, 2, 3)), rates, rtol=1e-2)


def test_the_same_again(bench, inverted):
    assert torch.equal(null_text(bench, inverted)[0].nulls, null_text(bench, inverted)[0].nulls)


@pytest.mark.parametrize("size", [(11, 17), (24, 8)], ids=str)
def test_other_sizes(bench, size):
    torch.manual_seed(0)
    made = ddim(bench, {"samples": torch.randn(1, 4, *size) * 4})[0]
    assert null_text(bench, made, inner=1)[0].nulls.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models(bench, inverted, dtype):
    """They learn in fp32: as near to the full-precision result as their weights are to its weights."""
    model = model_in(dtype, torch.float32)
    full = null_text(bench, inverted)[0].nulls
    learned = null_text(bench, inverted, model=model)[0].nulls
    moved = (full - bench.text("")[0][0]).abs().mean()
    assert learned.dtype == torch.float32 and (learned - full).abs().mean() < 0.3 * moved
    flags = {n: m.comfy_cast_weights for n, m in model.model.named_modules() if hasattr(m, "comfy_cast_weights")}
    again = model_in(dtype, torch.float32)
    assert flags == {n: m.comfy_cast_weights for n, m in again.model.named_modules() if n in flags}
    assert torch.equal(*(bench.sample(m, bench.text(SOURCE)) for m in (model, again)))


def test_half_precision_that_computes_in_half(bench, inverted):
    model = model_in(torch.bfloat16)
    before = bench.sample(model, bench.text(SOURCE))
    learned = null_text(bench, inverted, model=model, inner=1)[0].nulls
    assert learned.isfinite().all()
    assert torch.equal(bench.sample(model, bench.text(SOURCE)), before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_weights_are_refused_before_any_work(bench, inverted, dtype):
    model = model_in(torch.float16, torch.float32)
    weight = model.model.diffusion_model.get_parameter(ATTENTION)
    weight.requires_grad_(False)
    weight.data = weight.data.to(dtype)
    calls = []
    model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError) as error:
        null_text(bench, inverted, model=model)
    one_sentence(error, str(dtype).removeprefix("torch."), "no gradient flows", "load the checkpoint in fp16")
    assert not calls


def test_with_a_lora(bench, latent):
    patched = bench.model.clone()
    key = f"diffusion_model.{ATTENTION}"
    shape = bench.model.model.diffusion_model.get_parameter(ATTENTION).shape
    patched.add_patches({key: (torch.full(shape, 0.05),)}, 1.0)
    made = ddim(bench, latent, model=patched)[0]
    learned = null_text(bench, made, model=patched)[0]
    assert not torch.allclose(learned.nulls, null_text(bench, made)[0].nulls, atol=1e-4)


# ---- afterwards everything is as it was --------------------------------------------------------------------------


def state(bench):
    unet = bench.model.model.diffusion_model
    weights = {n: (p, p.is_inference(), p.requires_grad, p._version if not p.is_inference() else 0)
               for n, p in unet.named_parameters()}  # fmt: skip
    forwards = [n for n, m in bench.model.model.named_modules() if "forward" in m.__dict__]
    return weights, forwards, [k for k in bench.model.model_options], dict(bench.model.object_patches)


def same_state(bench, before):
    weights, *rest = state(bench)
    assert tuple(rest) == before[1:]
    assert weights.keys() == before[0].keys()
    for name, (weight, *flags) in weights.items():
        assert weight is before[0][name][0] and flags == list(before[0][name][1:]) and weight.grad is None


def fail_at(bench, number, problem):
    """Makes the ``number``-th run of the UNet end in ``problem``; returns the handle and the count of runs."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == number:
            raise problem

    return bench.model.model.diffusion_model.register_forward_pre_hook(hook), calls


@pytest.mark.parametrize("problem", [None, InterruptProcessingException(), RuntimeError("out of memory")], ids=str)
def test_the_model_is_as_it_was(bench, inverted, problem):
    drawn = bench.sample(bench.model, bench.text(TARGET))
    before = state(bench)
    handle, _ = fail_at(bench, 11, problem) if problem else (types.SimpleNamespace(remove=lambda: 0), 0)
    try:
        if problem is None:
            null_text(bench, inverted)
        else:
            with pytest.raises(type(problem)):
                null_text(bench, inverted)
    finally:
        handle.remove()
    same_state(bench, before)
    assert torch.equal(bench.sample(bench.model, bench.text(TARGET)), drawn)
    assert torch.is_inference_mode_enabled()


def held():
    gc.collect()
    seen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if torch.is_tensor(t)
    }
    return sum(seen.values())


def test_no_memory_is_held_over_five_runs(bench, inverted):
    null_text(bench, inverted, inner=1)
    before = held()
    for _ in range(5):
        null_text(bench, inverted, inner=1)
    assert held() - before < 10_000


def test_an_interrupted_run_goes_on_to_the_same_bits(bench, inverted, temporary):
    whole = null_text(bench, inverted)[0].nulls
    handle, calls = fail_at(bench, 13, InterruptProcessingException())  # in the third step's inner loop
    with pytest.raises(InterruptProcessingException):
        null_text(bench, inverted)
    handle.remove()
    (kept,) = (temporary / "user").rglob("*.safetensors")
    handle, calls = fail_at(bench, 0, None)
    assert torch.equal(null_text(bench, inverted)[0].nulls, whole)
    handle.remove()
    assert len(calls) == 3 * 5 and not kept.exists()


def test_what_was_learned_for_other_settings_is_not_used(bench, inverted, temporary):
    handle, _ = fail_at(bench, 13, InterruptProcessingException())
    with pytest.raises(InterruptProcessingException):
        null_text(bench, inverted)
    handle.remove()
    handle, calls = fail_at(bench, 0, None)
    null_text(bench, inverted, guidance=5.0)
    handle.remove()
    assert len(calls) == STEPS * 5
    for file in (temporary / "user").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    null_text(bench, inverted)  # begins anew


def test_a_disk_that_takes_nothing_does_not_hide_the_cancel(bench, inverted, temporary, monkeypatch):
    said = []
    shutil.rmtree(temporary / "user")
    (temporary / "user").write_text("no folder")
    monkeypatch.setattr(runs, "say", lambda node, text: said.append(text))
    handle, _ = fail_at(bench, 13, InterruptProcessingException())
    with pytest.raises(InterruptProcessingException):
        null_text(bench, inverted)
    handle.remove()
    assert said[-1] == "stopped after step 2 of 5, which could not be kept (Not a directory)"
    assert "what is learned so far could not be kept (Not a directory)" in said
    whole = null_text(bench, inverted)[0]  # nor does it hinder a run that ends well
    assert whole.nulls.isfinite().all()


def steps_kept(folder):
    (kept,) = (folder / "user").rglob("*.safetensors")
    return len(load_file(kept)["nulls"])


def test_work_is_kept_while_it_goes_on(bench, inverted, temporary, monkeypatch):
    """As much as a kill would leave, since a killed run writes nothing any more."""
    seen = []

    def look(node, text):
        if "update 3" in text:
            for thread in threading.enumerate():
                if thread.name.startswith("ThreadPoolExecutor"):
                    wait_for_file(temporary / "user")
                    seen.append((text.split(",")[0], steps_kept(temporary)))

    monkeypatch.setattr(runs, "say", look)
    null_text(bench, inverted)
    assert [step for step, _ in seen] == [f"step {n} of 5" for n in (2, 3, 4, 5)]
    # A file may be a step behind, where the next was done before it was written.
    assert all(n - 1 in (kept, kept + 1) for n, (_, kept) in enumerate(seen, 2))
    assert not list((temporary / "user").rglob("*.*"))
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def wait_for_file(folder):
    deadline = time.monotonic() + 60
    while not list(folder.rglob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_kept_file_that_was_damaged_is_not_used(bench, inverted, temporary):
    whole = null_text(bench, inverted)[0].nulls
    handle, _ = fail_at(bench, 13, InterruptProcessingException())
    with pytest.raises(InterruptProcessingException):
        null_text(bench, inverted)
    handle.remove()
    (kept,) = (temporary / "user").rglob("*.safetensors")
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    handle, calls = fail_at(bench, 0, None)
    assert torch.equal(null_text(bench, inverted)[0].nulls, whole)
    handle.remove()
    assert len(calls) == STEPS * 5


def test_unfinished_work_takes_bounded_room(tmp_path, monkeypatch):
    """The oldest makes room; what alone is too large is not written."""
    tmp_path = tmp_path / "kept"
    paths = [tmp_path / f"{number}.safetensors" for number in range(12)]
    for number, path in enumerate(paths):
        unfinished.keep({"x": torch.zeros(1000)}, "[]", path)
        os.utime(path, (number, number))
    assert sorted(tmp_path.iterdir()) == sorted(paths[-unfinished.FILES :])
    monkeypatch.setattr(unfinished, "MOST", 3 * paths[-1].stat().st_size + 100)
    unfinished.keep({"x": torch.zeros(1000)}, "[]", paths[0])
    assert sorted(tmp_path.iterdir()) == sorted([paths[0], *paths[-2:]])
    with pytest.raises(OSError, match="more than the 0 MB for unfinished work"):
        unfinished.keep({"x": torch.zeros(4000)}, "[]", paths[0])
    assert len(load_file(paths[0])["x"]) == 1000, "what was there before is gone"


def test_cancel_is_seen_in_the_inner_loop(bench, inverted):
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing()

    handle = bench.model.model.diffusion_model.register_forward_pre_hook(hook)
    with pytest.raises(InterruptProcessingException):
        null_text(bench, inverted, inner=10)
    handle.remove()
    assert len(calls) == 3


def test_progress_tells_step_and_loss(bench, inverted, monkeypatch):
    said, shown = [], []
    monkeypatch.setattr(runs, "say", lambda node, text: said.append(text))
    import comfy.utils

    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id: shown.append((value, total))
    )
    null_text(bench, inverted, inner=2)
    assert "step 2 of 5, update 1: loss" in said[2] and said[-1].startswith(f"{2 * STEPS} updates in {STEPS} steps")
    assert shown == [(i + 1, 2 * STEPS) for i in range(2 * STEPS)]


def test_no_gradient_is_said_in_words(bench, inverted):
    model = bench.model.clone()
    model.set_model_attn2_replace(lambda q, k, v, options: (q * 0).detach() + 1, "input", 1)
    blocked = model.clone()
    for block, number in (
        [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("middle", 0)] + [("output", n) for n in range(3, 12)]
    ):
        blocked.set_model_attn2_replace(lambda q, k, v, options: (q * 0).detach(), block, number)
    with pytest.raises(ValueError) as error:
        null_text(bench, inverted, model=blocked)
    one_sentence(error, "No gradient came back", "before that pack's node")


def test_a_loss_that_is_not_finite(bench, inverted):
    with overflowing(bench.model), pytest.raises(ValueError) as error:
        null_text(bench, inverted)
    one_sentence(error, "not a finite number", "lower learning_rate")


def test_several_texts_are_refused(bench, inverted):
    with pytest.raises(ValueError) as error:
        null_text(bench, inverted, negative=bench.text("") + bench.text("a"))
    one_sentence(error, "2 texts", "Combine")


# ---- direct and negative-prompt ----------------------------------------------------------------------------------


def test_direct_inversion(bench, inverted):
    (pinned,) = outputs(invert.AttuneDirectInversion, inverted, 1, 1.0, GUIDANCE)
    assert pinned.latents is inverted.latents
    more = GUIDANCE, bench.model, bench.text("")
    (loose,) = outputs(invert.AttuneDirectInversion, inverted, 1, 0.0, *more)
    drawn = runs.draw_again(bench.model, inverted, bench.text(""), GUIDANCE)
    assert torch.equal(loose.latents, drawn)
    (second,) = outputs(invert.AttuneDirectInversion, inverted, 2, 1.0, *more)
    off = [distance(a, b) for a, b in zip(second.latents, inverted.latents, strict=True)]
    # Pinned after the first, third and fifth step.
    assert off[1] == off[3] == off[5] == 0 and min(off[2], off[4]) > 0
    with pytest.raises(ValueError) as error:
        outputs(invert.AttuneDirectInversion, inverted, 2, 1.0, GUIDANCE)
    one_sentence(error, "connect both to Attune Direct Inversion", "set every and scale to 1")


def test_negative_prompt_inversion_cancels_guidance(bench, inverted):
    learned, negative = outputs(invert.AttuneNegativePromptInversion, inverted)
    assert negative is inverted.conditioning and "interpolation" not in learned.header
    half = outputs(invert.AttuneNegativePromptInversion, inverted, 0.5, bench.text(""))[1]
    apart = [distance(half[0][0], text[0][0]) for text in (negative, bench.text(""))]
    assert min(apart) > 1e-3 and max(apart) < distance(negative[0][0], bench.text("")[0][0])
    plain = outputs(invert.AttuneNegativePromptInversion, inverted, 1.0, bench.text(""))[1]
    assert torch.equal(plain[0][0], bench.text("")[0][0])
    with pytest.raises(ValueError, match="connect an empty CLIP Text Encode to Attune Negative-Prompt Inversion"):
        outputs(invert.AttuneNegativePromptInversion, inverted, 0.5)
    wide = [[torch.zeros(1, 77, 8), {}]]
    with pytest.raises(ValueError, match="8 wide and the TRAJECTORY's .* to empty on Attune Negative-Prompt Inversion"):
        outputs(invert.AttuneNegativePromptInversion, inverted, 0.5, wide)
    at_one = runs.draw_again(bench.model, inverted, [], 1.0)
    assert torch.allclose(runs.draw_again(bench.model, learned, negative, GUIDANCE), at_one, atol=1e-2)


def test_an_edit_takes_every_kind_of_trajectory(bench, inverted):
    plain = None
    for made, negative in (
        (inverted, bench.text("")),
        null_text(bench, inverted),
        outputs(invert.AttuneNegativePromptInversion, inverted),
        (*outputs(invert.AttuneDirectInversion, inverted, 1, 1.0, GUIDANCE), bench.text("")),
    ):
        model, positive = outputs(
            AttunePromptSwap, bench.model, bench.clip, made, SOURCE, TARGET, 0.0, 0.8, 0.0, 0.4, 1024
        )
        edited = bench.sample(model, positive, start(made), guidance=GUIDANCE, negative=negative, sigmas=made.sigmas)
        assert edited.isfinite().all()
        plain = edited if plain is None else plain
    assert torch.equal(edited, plain)  # direct inversion is what every edit does


# ---- recording ---------------------------------------------------------------------------------------------------

ON_GRID = ["euler", "euler_ancestral", "heun", "dpm_2", "lms", "dpmpp_2m", "dpmpp_2m_sde", "ddim", "uni_pc", "lcm"]


def record(bench, sampler="euler", seed=3, latent=None, sigmas=None, model=None, cfg=4.0, add_noise=True):
    chosen = outputs(custom.KSamplerSelect, sampler)[0]
    latent = latent or {"samples": torch.zeros(1, 4, 16, 16)}
    sigmas = bench.sigmas if sigmas is None else sigmas
    common = add_noise, seed, cfg, bench.text(SOURCE), bench.text(""), chosen, sigmas, latent
    return outputs(invert.AttuneRecordTrajectory, model or bench.model, *common), common


@pytest.mark.parametrize("sampler", ON_GRID)
def test_recording_draws_the_stock_samplers_picture(bench, sampler):
    (made, picture, noise, sigmas), common = record(bench, sampler)
    expected = outputs(custom.SamplerCustom, bench.model, *common)[0]["samples"]
    assert torch.equal(picture["samples"], expected)
    assert torch.allclose(made.latents[-1], runs.to_model_scale(bench.model, expected), atol=1e-5)
    assert made.latents.isfinite().all() and torch.equal(sigmas, common[6])


def test_a_recorded_euler_run_is_a_trajectory_to_the_bit(bench):
    (made, picture, noise, sigmas), common = record(bench)
    seen = []
    chosen = common[5]
    import comfy.sample

    comfy.sample.sample_custom(
        bench.model, runs.noise_for(common[7], 3), 4.0, chosen, sigmas, bench.text(SOURCE), bench.text(""),
        common[7]["samples"], callback=lambda step, x0, x, total: seen.append(x.clone()), disable_pbar=True, seed=3,
    )  # fmt: skip
    assert torch.equal(made.latents[:-1], torch.stack(seen).float())
    again = bench.sample(bench.model, bench.text(SOURCE), noise, sigmas=sigmas, guidance=4.0)
    assert distance(again, picture["samples"]) < 1e-3


@pytest.mark.parametrize("grid", [runs.HOST_GRID, runs.PAPERS_GRID])
def test_a_recorded_run_counts_the_grids_steps(bench, grid):
    """Windows are shares of the same number of steps, whether a picture was inverted or recorded."""
    sigmas = runs.schedule(bench.model, 5, grid)
    (made, *_), _ = record(bench, sigmas=sigmas)
    assert made.steps == 5


def test_recording_batches_masks_and_partial_runs(bench, latent):
    both = {"samples": torch.cat([latent["samples"]] * 2), "noise_mask": torch.zeros(1, 1, 128, 128)}
    both["noise_mask"][..., :64] = 1
    (made, picture, noise, _), common = record(bench, latent=both, sigmas=bench.sigmas[2:], seed=1)
    assert torch.equal(picture["samples"], outputs(custom.SamplerCustom, bench.model, *common)[0]["samples"])
    assert made.latents.shape[1] == 2 and "noise_mask" in picture and "noise_mask" not in noise


def test_a_recorded_picture_is_edited_like_a_real_one(bench):
    (made, picture, noise, sigmas), _ = record(bench)
    model, positive = outputs(AttunePromptSwap, bench.model, bench.clip, made, SOURCE, TARGET, 0.0, 0.8, 0.0, 0.4, 1024)
    edited = bench.sample(model, positive, noise, guidance=4.0, sigmas=sigmas)
    plain = bench.sample(bench.model, positive, noise, guidance=4.0, sigmas=sigmas)
    assert 0.01 < distance(edited, picture["samples"]) < distance(plain, picture["samples"])


def test_a_recorded_run_with_null_embeddings_is_the_free_source_row(bench, latent):
    """Which is how null-text's authors edit: the source is what the embeddings draw, not the inversion pinned."""
    inverted = ddim(bench, latent)[0]
    learned, negative = null_text(bench, inverted)
    euler = outputs(custom.KSamplerSelect, "euler")[0]

    def free(away):
        common = False, 0, GUIDANCE, bench.text(SOURCE), away, euler, inverted.sigmas, start(inverted)
        return outputs(invert.AttuneRecordTrajectory, bench.model, *common)[0]

    recorded, expected = free(negative), runs.draw_again(bench.model, learned, negative, GUIDANCE)
    assert distance(recorded.latents, expected) < 1e-5
    assert distance(inverted.latents, expected) > 0.01 and distance(free(bench.text("")).latents, expected) > 0.01
    # An edit starts from it: where both prompts are one, it draws the recorded picture, not the inverted one.
    model, positive = outputs(
        AttunePromptSwap, bench.model, bench.clip, recorded, SOURCE, SOURCE, 0.0, 1.0, 0.0, 1.0, 1024
    )
    same = bench.sample(model, positive, start(recorded), guidance=GUIDANCE, negative=negative, sigmas=recorded.sigmas)
    drawn = runs.to_model_scale(bench.model, same)
    assert distance(drawn, expected[-1]) < 1e-4 < distance(inverted.latents[-1], expected[-1])


def test_samplers_that_leave_the_grid_and_bad_sigmas(bench):
    with pytest.raises(ValueError) as error:
        record(bench, "dpm_fast")
    one_sentence(error, "never asked the MODEL at noise level", "such as euler")
    with pytest.raises(ValueError) as error:
        record(bench, sigmas=bench.sigmas.flip(0))
    one_sentence(error, "do not fall", "Flip Sigmas")
    with pytest.raises(ValueError) as error:
        record(bench, model=dit(), latent={"samples": torch.zeros(1, 4, 16, 16)})
    one_sentence(error, "Stable Diffusion UNets")


# ---- part of the way, and the report -----------------------------------------------------------------------------


def test_starting_part_of_the_way(bench, inverted):
    for strength, step in ((1.0, -1), (0.6, -1), (0.0, 5), (1.0, 2)):
        latent, sigmas = outputs(trajectory.AttuneTrajectoryLatent, inverted, strength, step)
        first = step if step >= 0 else STEPS - round(strength * STEPS)
        assert torch.equal(latent["samples"], runs.host_latent(inverted, first)) and len(sigmas) == STEPS + 1 - first
    latent, sigmas = outputs(trajectory.AttuneTrajectoryLatent, inverted, 0.6, -1)
    back = bench.sample(bench.model, bench.text(SOURCE), latent, guidance=1.0, sigmas=sigmas)
    tail = replace(inverted, sigmas=sigmas, latents=inverted.latents[2:])
    drawn = runs.draw_again(bench.model, tail, [], 1.0)
    assert distance(runs.to_model_scale(bench.model, back), drawn[-1]) < 1e-2
    with pytest.raises(ValueError) as error:
        outputs(trajectory.AttuneTrajectoryLatent, inverted, 1.0, 6)
    one_sentence(error, "The step is 6", "from 0 to 5")


def test_the_report(bench, inverted, image):
    verdict, table, sheet = outputs(
        trajectory.AttuneInversionReport, inverted, bench.model, bench.vae, image, GUIDANCE, bench.text("")
    )
    assert "drifts from step" in verdict and "null-text" in verdict and sheet.shape[0] == 1
    rows = {r.split("|")[1].strip(): r for r in table.splitlines()[2:]}
    assert list(rows) == ["VAE alone", "guidance 1", "guidance 7.5", "pinned source"]
    value = {name: float(row.split("|")[2]) for name, row in rows.items()}
    assert (
        value["guidance 7.5"]
        < value["guidance 1"]
        < value["pinned source"]
        == pytest.approx(value["VAE alone"], abs=0.1)
    )
    with pytest.raises(ValueError) as error:
        outputs(trajectory.AttuneInversionReport, inverted, bench.model, bench.vae, image, GUIDANCE)
    one_sentence(error, "holds no negative", "Attune Inversion Report")
    with pytest.raises(ValueError) as error:
        outputs(trajectory.AttuneInversionReport, inverted, bench.model, bench.vae, image[:, :64], 1.0)
    one_sentence(error, "128x64", "connect the image that was inverted")
    # A few pixels more than the VAE takes are cut as it cuts them.
    wide = torch.nn.functional.pad(image.movedim(-1, 1), (2, 3, 1, 2)).movedim(1, -1)
    cut = outputs(trajectory.AttuneInversionReport, inverted, bench.model, bench.vae, wide, 1.0)
    # Alpha counts for nothing.
    alpha = torch.cat([image, torch.rand_like(image[..., :1])], -1)
    assert outputs(trajectory.AttuneInversionReport, inverted, bench.model, bench.vae, alpha, 1.0)[1] == cut[1]


# ---- files -------------------------------------------------------------------------------------------------------


def test_a_trajectory_survives_a_file(bench, inverted, temporary):
    for made in (inverted, null_text(bench, inverted, inner=1)[0], record(bench)[0][0]):
        (name,) = outputs(trajectory.AttuneSaveTrajectory, made, "some/where")
        assert name in runs.trajectory_files()
        back, prompt = outputs(trajectory.AttuneLoadTrajectory, name)
        assert torch.equal(back.latents, made.latents) and torch.equal(back.sigmas, made.sigmas)
        assert back.header == made.header and back.steps == made.steps and back.windows == made.windows
        assert (back.nulls is None) == (made.nulls is None)
        assert made.nulls is None or torch.equal(back.nulls, made.nulls)
        for ours, theirs in zip(back.conditioning + back.negative, made.conditioning + made.negative, strict=True):
            assert torch.equal(ours[0], theirs[0]) and ours[1].keys() == theirs[1].keys()
    assert len(runs.trajectory_files()) == 3


NOT_FINITE = "no finite numbers .NaN or infinite."


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_latent_that_is_no_picture_is_refused_where_it_comes_in(bench, latent, value):
    broken = latent["samples"].clone()
    broken[..., 3, 3] = value
    broken = {"samples": broken}
    with pytest.raises(ValueError) as error:
        ddim(bench, broken)
    one_sentence(error, NOT_FINITE, "--fp32-vae", "latent of Attune DDIM Inversion")
    with pytest.raises(ValueError) as error:
        record(bench, latent=broken)
    one_sentence(error, NOT_FINITE, "latent_image of Attune Record Trajectory")


@pytest.mark.parametrize("run", [ddim, lambda bench, latent: record(bench, latent=latent)], ids=["ddim", "record"])
def test_a_model_that_breaks_down_is_told(bench, latent, run):
    handle = bench.model.model.diffusion_model.register_forward_hook(lambda *args: args[-1] * float("nan"))
    try:
        with pytest.raises(ValueError) as error:
            run(bench, latent)
    finally:
        handle.remove()
    one_sentence(error, NOT_FINITE, "--force-fp32")


def test_what_a_loaded_trajectory_was_made_under(bench, inverted):
    learned, negative = null_text(bench, inverted, inner=1)
    (name,) = outputs(trajectory.AttuneSaveTrajectory, learned, "t")
    positive, again = outputs(
        trajectory.AttuneTrajectoryConditioning, outputs(trajectory.AttuneLoadTrajectory, name)[0]
    )
    assert torch.equal(positive[0][0], bench.text(SOURCE)[0][0]) and len(again) == len(negative)
    for (a, with_a), (b, with_b) in zip(again, negative, strict=True):
        assert torch.equal(a, b) and with_a["start_percent"] == with_b["start_percent"]
    blocked = outputs(trajectory.AttuneTrajectoryConditioning, inverted)[1]
    assert "holds no negative" in blocked.message


def test_the_cache_key_follows_the_content(bench, inverted, temporary):
    node = trajectory.AttuneLoadTrajectory
    (name,) = outputs(trajectory.AttuneSaveTrajectory, inverted, "t")
    key = node.fingerprint_inputs(name)
    path = runs.trajectory_path(name)
    content = path.read_bytes()
    assert key == node.fingerprint_inputs(name)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert key != node.fingerprint_inputs(name)
    with pytest.raises(ValueError) as error:
        outputs(node, name)
    one_sentence(error, "was changed after it was saved", "Attune Load Trajectory")


BAD_NAMES = [
    "",
    "none",
    "/etc/passwd",
    "t.safetensors",
    "absent.trajectory.safetensors",
    "../t.trajectory.safetensors",
    "a/../../t.trajectory.safetensors [output]",
    "\\\\host\\share.trajectory.safetensors",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere(name, temporary):
    (temporary / "t.trajectory.safetensors").write_bytes(b"x")
    said = trajectory.AttuneLoadTrajectory.validate_inputs(name)
    assert isinstance(said, str) and said.endswith(".") and "Attune Load Trajectory" in said


@pytest.mark.parametrize("prefix", ["../out", "/tmp/out", "a/../../out"])
def test_saving_stays_in_the_output_folder(inverted, prefix, temporary):
    with pytest.raises(ValueError) as error:
        outputs(trajectory.AttuneSaveTrajectory, inverted, prefix)
    one_sentence(error, "leads out of ComfyUI's output folder", "Attune Save Trajectory")
    assert not list(temporary.glob("*.safetensors"))


def test_a_conditioning_that_no_file_can_hold(bench, latent):
    text = [[bench.text(SOURCE)[0][0], {**bench.text(SOURCE)[0][1], "control": object()}]]
    made = outputs(
        invert.AttuneDDIMInversion, bench.model, latent, bench.text(SOURCE), STEPS, invert.GRIDS[0], invert.LEVELS[0]
    )[0]
    made.conditioning[:] = text
    with pytest.raises(ValueError) as error:
        outputs(trajectory.AttuneSaveTrajectory, made, "t")
    one_sentence(error, '"control"', "take the node that sets it out")
