"""What every method promises, whatever it does: each test runs through all of ``bench.METHODS``."""

import comfy.model_management
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_pag as pag
import pytest
import torch
from comfy.model_management import InterruptProcessingException

import nodes as stock

from .bench import METHODS, QUICK, SOURCE, Bench, adapter, apply_ip_adapter, outputs

pytestmark = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
OTHER = "a green star on a white background"
SMALL = {"height": 8, "steps": 4}


@pytest.fixture(scope="module")
def benches():
    """One for each size that some method is tested at."""
    return {}


@pytest.fixture
def bench(method, benches):
    settings = SMALL | QUICK.get(method, {})
    name = tuple(settings.items())
    if name not in benches:
        benches[name] = Bench(**settings)
    return benches[name]


@pytest.fixture(scope="module")
def known():
    """What several tests compare with, drawn once. That the same call draws the same picture has a test of its own."""
    return {}


@pytest.fixture
def on(method, bench, known):
    """The model with the edit, its positive, and what they draw."""
    if method not in known:
        model, positive = method(bench, 1)
        known[method] = model, positive, bench.sample(model, positive)
    return known[method]


@pytest.fixture
def plain(method, bench, known, on):
    """What the unpatched model draws with the edit's positive."""
    if (method, "plain") not in known:
        known[method, "plain"] = bench.sample(bench.model, on[1])
    return known[method, "plain"]


def differ(a, b):
    """The greatest difference, as a share of the pictures' own spread."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.std())


def test_the_edit_shows(bench, on, plain):
    _, _, edited = on
    assert differ(edited, plain) > 0.1
    assert differ(edited, bench.sample(bench.model, bench.text(SOURCE))) > 0.1


def test_strength_zero_is_the_unpatched_model(method, bench):
    model, positive = method(bench, 0)
    assert torch.equal(bench.sample(model, positive), bench.sample(bench.model, positive))


def test_the_same_again(method, bench, on):
    model, positive, first = on
    assert torch.equal(first, bench.sample(model, positive))
    again, positive = method(bench, 1)
    assert torch.equal(first, bench.sample(again, positive))


def test_clones_do_not_see_each_other(method, bench, on, plain):
    before = bench.sample(bench.model, bench.text(OTHER))
    model, positive, edited = on
    off, _ = method(bench, 0)
    copy = model.clone()
    assert torch.equal(bench.sample(off, positive), plain)
    assert torch.equal(bench.sample(copy, positive), edited)
    assert torch.equal(bench.sample(bench.model, bench.text(OTHER)), before)


def test_split_conditionings_agree_with_batched(bench, on, monkeypatch):
    """On little memory the host runs the conditionings one by one."""
    model, positive, batched = on
    calls = []
    unet = bench.model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    try:
        monkeypatch.setattr(
            comfy.model_management, "get_free_memory", lambda *a, **k: (0, 0) if k.get("torch_free_too") else 0
        )
        split = bench.sample(model, positive)
    finally:
        handle.remove()
    assert max(calls) == 1, "the host did not split"
    assert differ(split, batched) < 1e-3


def test_a_batch_of_two_is_two_pictures(method, bench):
    both = bench.like(batch=2)
    model, positive = method(both, 1)
    together = both.sample(model, positive)
    assert together.shape[0] == 2 and differ(together[0], together[1]) > 0.1
    for i in range(2):
        one = bench.like()
        one.noise = {"samples": both.noise["samples"][i : i + 1]}
        one.trajectory = one.record(SOURCE, one.guidance)
        model, positive = method(one, 1)
        assert differ(one.sample(model, positive)[0], together[i]) < 2e-3


def test_one_source_serves_a_batch(bench, on):
    model, positive, edited = on
    twice = {"samples": bench.noise["samples"].repeat(2, 1, 1, 1)}
    pair = bench.sample(model, positive, latent=twice)
    assert differ(pair[0], pair[1]) < 1e-4
    assert differ(pair[:1], edited) < 2e-3


@pytest.mark.parametrize("size", [(8, 12), (17, 11)], ids=str)
def test_any_size(method, bench, size):
    wide = bench.like(height=size[0], width=size[1])
    model, positive = method(wide, 1)
    edited = wide.sample(model, positive)
    assert edited.shape[2:] == size
    assert differ(edited, wide.sample(wide.model, positive)) > 0.1


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde"])
def test_other_samplers(bench, on, sampler):
    """Samplers that ask twice in a step, or between grid points, read the right place of the source."""
    model, positive, _ = on
    edited = bench.sample(model, positive, sampler=sampler)
    assert differ(edited, bench.sample(bench.model, positive, sampler=sampler)) > 0.05


def test_perturbed_attention_runs_beside_it(method, bench, on, plain):
    """Its extra pass has one row, which is the positive one, and must be edited as that was: it is the difference of
    the two that it multiplies by its scale, so an edit missing from one of them would blow up."""
    model, positive, edited = on
    off, _ = method(bench, 0)
    perturbed = outputs(pag.PerturbedAttentionGuidance, bench.model, 100.0)[0]
    alone = bench.sample(perturbed, positive)
    effect = differ(alone, plain)
    assert effect > 1e-3, "perturbed attention does nothing here"
    for before in (False, True):  # either order of the nodes
        patch = outputs(pag.PerturbedAttentionGuidance, model, 100.0)[0]
        both = bench.sample(method(bench, 1, model=perturbed)[0] if before else patch, positive)
        assert differ(both, alone) > 0.05
        assert 0.02 * effect < differ(both, edited) < 20 * effect
    quiet = outputs(pag.PerturbedAttentionGuidance, off, 100.0)[0]
    assert torch.equal(bench.sample(quiet, positive), alone)


@pytest.mark.parametrize("both", [True, False], ids=["both halves", "positive only"])
def test_a_controlnet_in_the_same_graph(method, bench, on, plain, both):
    """On the positive only, the host splits the batch."""
    hint = torch.rand(1, 128, 128, 1).repeat(1, 1, 1, 3)

    def with_control(positive):
        apply = stock.ControlNetApplyAdvanced
        empty = bench.away(positive)
        steered, negative = outputs(apply, positive, empty, adapter(), hint, 1.0, 0.0, 1.0)
        return {"positive": steered, "negative": negative if both else empty}

    model, positive, _ = on
    off, _ = method(bench, 0)
    conds = with_control(positive)
    without = bench.sample(bench.model, **conds)
    assert differ(without, plain) > 0.05, "the adapter does nothing"
    assert torch.equal(bench.sample(off, **conds), without)
    assert differ(bench.sample(model, **conds), without) > 0.05


def test_a_combined_positive(method, bench, on):
    """Only the rows of the edit's own prompt are edited."""
    model, positive, _ = on
    off, _ = method(bench, 0)
    combined = positive + bench.text(OTHER)
    without, edited = (bench.sample(one, combined) for one in (bench.model, model))
    assert torch.equal(bench.sample(off, combined), without)
    assert differ(edited, without) > 0.05
    assert differ(edited, bench.sample(model, bench.text(OTHER) + positive)) < 1e-3


def test_a_negative_made_from_the_positive(bench, on):
    """Zeroing out keeps the positive's tag, but what is negative is not edited."""
    model, positive, _ = on
    zeroed = outputs(stock.ConditioningZeroOut, positive)[0]
    bare = [[zeroed[0][0], {k: v for k, v in zeroed[0][1].items() if k == "pooled_output"}]]
    bare = bench.away(positive, bare)
    pictures = (bench.sample(model, positive, negative=negative) for negative in (zeroed, bare))
    assert torch.equal(*pictures)


def test_a_step_cache_beside_it(bench, on):
    """EasyCache skips passes that change little; the source's must never be skipped."""
    model, positive, _ = on
    cached = outputs(easycache.EasyCacheNode, model, 10.0, 0.2, 0.9, False)[0]
    edited = bench.sample(cached, positive)
    assert edited.isfinite().all() and edited.shape == bench.noise["samples"].shape


def test_every_stock_sampler_node(bench, on):
    model, positive, reference = on
    empty, noise = bench.away(positive), bench.noise
    advanced = outputs(
        stock.KSamplerAdvanced, model, "disable", 0, bench.steps, bench.guidance, "euler", "ddim_uniform", positive,
        empty, noise, 0, 10000, "disable",
    )[0]["samples"]  # fmt: skip
    guider = outputs(custom.CFGGuider, model, positive, empty, bench.guidance)[0]
    quiet, euler = outputs(custom.DisableNoise)[0], outputs(custom.KSamplerSelect, "euler")[0]
    by_guider = outputs(custom.SamplerCustomAdvanced, quiet, guider, euler, bench.sigmas, noise)[0]["samples"]
    assert differ(advanced, reference) < 1e-3 and differ(by_guider, reference) < 1e-3


def test_a_longer_negative(bench, on):
    """The host repeats the shorter text to the longer one's length; the edit must not notice."""
    model, positive, _ = on
    long = bench.text(" ".join(["a red star on a white background"] * 14))
    assert long[0][0].shape[1] == 154
    half = [[long[0][0][:, :77], long[0][1]]]
    twice = [[torch.cat([half[0][0], half[0][0]], 1), long[0][1]]]
    # Attention over a text and over the same text twice is one and the same.
    twice, half = (bench.away(positive, text) for text in (twice, half))
    pictures = (bench.sample(model, positive, negative=negative) for negative in (twice, half))
    assert differ(*pictures) < 1e-3


def test_an_inpainting_mask(method, bench, on):
    model, positive, _ = on
    off, _ = method(bench, 0)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    masked = {**bench.noise, "noise_mask": mask}
    without = bench.sample(bench.model, positive, latent=masked)
    assert torch.equal(bench.sample(off, positive, latent=masked), without)
    edited = bench.sample(model, positive, latent=masked)
    assert differ(edited[..., 9:], without[..., 9:]) > 0.05


def test_an_ip_adapter_before_and_after(method, bench, on):
    """Packs that call .add on what they find in a slot work in either order, and what they add stays."""
    _, positive, edited = on
    off, _ = method(bench, 0)
    alone = bench.sample(apply_ip_adapter(bench.model, 0.3), positive)
    assert torch.equal(bench.sample(apply_ip_adapter(off, 0.3), positive), alone)
    after = bench.sample(apply_ip_adapter(method(bench, 1)[0], 0.3), positive)
    before = bench.sample(method(bench, 1, model=apply_ip_adapter(bench.model, 0.3))[0], positive)
    twice = apply_ip_adapter(apply_ip_adapter(method(bench, 1)[0], 0.2), 0.1)
    assert torch.equal(after, before)
    assert differ(after, alone) > 0.05
    assert differ(after, edited) > 0.05
    assert differ(bench.sample(twice, positive), after) < 1e-3


@pytest.mark.usefixtures("server_progress")
def test_interrupt_leaves_nothing_behind(bench, on, plain):
    model, positive, whole = on
    calls = []

    def cancel(_, args):
        calls.append(args)
        if len(calls) == bench.steps - 1:
            comfy.model_management.interrupt_current_processing()

    handle = bench.model.model.diffusion_model.register_forward_pre_hook(cancel)
    try:
        with pytest.raises(InterruptProcessingException):
            bench.sample(model, positive)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert len(calls) <= 7
    assert not [k for k in model.model_options["transformer_options"] if k.endswith("_run")]
    assert torch.equal(bench.sample(model, positive), whole)
    assert torch.equal(bench.sample(bench.model, positive), plain)


def test_steps_are_told_by_sigma_not_by_counting(method, bench, on):
    """A run that starts half-way is the second half of the whole run."""
    model, positive, whole = on
    middle = len(bench.sigmas) // 2
    first = {"samples": bench.sample(model, positive, sigmas=bench.sigmas[: middle + 1])}
    second = bench.sample(model, positive, latent=first, sigmas=bench.sigmas[middle:])
    if method is METHODS["refine, reweight and local blend"]:
        # What the first half saw of the words is lost, so the mask may differ; what was seen twice does not.
        assert torch.equal(second, bench.sample(model, positive, latent=first, sigmas=bench.sigmas[middle:]))
    else:
        assert differ(second, whole) < 1e-3


def test_half_precision(bench, on, plain):
    """In bf16, the half precision that a CPU can run, the edit is finite and the same edit within its grain."""
    model, positive, exact = on
    half = model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    rough = bench.sample(half, positive)
    plain_half = bench.model.clone()
    plain_half.set_model_compute_dtype(torch.bfloat16)
    grain = (bench.sample(plain_half, positive) - plain).abs().mean()
    assert (rough - exact).abs().mean() < 4 * grain + 0.02 * exact.std()
