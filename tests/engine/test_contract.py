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


@pytest.fixture(scope="module")
def benches():
    """One for each size that some method is tested at."""
    return {}


@pytest.fixture
def bench(method, benches):
    settings = QUICK.get(method, {})
    if tuple(settings) not in benches:
        benches[tuple(settings)] = Bench(**settings)
    return benches[tuple(settings)]


@pytest.fixture
def plain(bench):
    """What the unpatched model draws with the target prompt."""
    return lambda positive, **kwargs: bench.sample(bench.model, positive, **kwargs)


def differ(a, b):
    """The greatest difference, as a share of the pictures' own spread."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.std())


def test_the_edit_shows(method, bench, plain):
    model, positive = method(bench, 1)
    edited = bench.sample(model, positive)
    assert differ(edited, plain(positive)) > 0.1
    assert differ(edited, bench.sample(bench.model, bench.text(SOURCE))) > 0.1


def test_strength_zero_is_the_unpatched_model(method, bench, plain):
    model, positive = method(bench, 0)
    assert torch.equal(bench.sample(model, positive), plain(positive))


def test_the_same_again(method, bench):
    model, positive = method(bench, 1)
    first = bench.sample(model, positive)
    assert torch.equal(first, bench.sample(model, positive))
    again, positive = method(bench, 1)
    assert torch.equal(first, bench.sample(again, positive))


def test_clones_do_not_see_each_other(method, bench, plain):
    before = plain(bench.text(OTHER))
    model, positive = method(bench, 1)
    edited = bench.sample(model, positive)
    off, _ = method(bench, 0)
    copy = model.clone()
    assert torch.equal(bench.sample(off, positive), plain(positive))
    assert torch.equal(bench.sample(copy, positive), edited)
    assert torch.equal(plain(bench.text(OTHER)), before)


def test_split_conditionings_agree_with_batched(method, bench, monkeypatch):
    """On little memory the host runs the conditionings one by one."""
    model, positive = method(bench, 1)
    batched = bench.sample(model, positive)
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


def test_one_source_serves_a_batch(method, bench):
    model, positive = method(bench, 1)
    twice = {"samples": bench.noise["samples"].repeat(2, 1, 1, 1)}
    pair = bench.sample(model, positive, latent=twice)
    assert differ(pair[0], pair[1]) < 1e-4
    assert differ(pair[:1], bench.sample(model, positive)) < 2e-3


@pytest.mark.parametrize("size", [(16, 24), (17, 11)], ids=str)
def test_any_size(method, bench, size):
    wide = bench.like(height=size[0], width=size[1])
    model, positive = method(wide, 1)
    edited = wide.sample(model, positive)
    assert edited.shape[2:] == size
    assert differ(edited, wide.sample(wide.model, positive)) > 0.1


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde"])
def test_other_samplers(method, bench, sampler):
    """Samplers that ask twice in a step, or between grid points, read the right place of the source."""
    model, positive = method(bench, 1)
    edited = bench.sample(model, positive, sampler=sampler)
    assert differ(edited, bench.sample(bench.model, positive, sampler=sampler)) > 0.05


def test_perturbed_attention_runs_beside_it(method, bench, plain):
    """Its extra pass has one row, which is the positive one, and must be edited as that was: it is the difference of
    the two that it multiplies by its scale, so an edit missing from one of them would blow up."""
    on, positive = method(bench, 1)
    off, _ = method(bench, 0)
    perturbed = outputs(pag.PerturbedAttentionGuidance, bench.model, 100.0)[0]
    alone = bench.sample(perturbed, positive)
    effect = differ(alone, plain(positive))
    assert effect > 1e-3, "perturbed attention does nothing here"
    edited = bench.sample(on, positive)
    for first in (True, False):  # either order of the nodes
        model = outputs(pag.PerturbedAttentionGuidance, on, 100.0)[0] if first else method(bench, 1, model=perturbed)[0]
        both = bench.sample(model, positive)
        assert differ(both, alone) > 0.05
        assert 0.02 * effect < differ(both, edited) < 20 * effect
    quiet = outputs(pag.PerturbedAttentionGuidance, off, 100.0)[0]
    assert torch.equal(bench.sample(quiet, positive), alone)


@pytest.mark.parametrize("both", [True, False], ids=["both halves", "positive only"])
def test_a_controlnet_in_the_same_graph(method, bench, both):
    """On the positive only, the host splits the batch."""
    hint = torch.rand(1, 128, 128, 1).repeat(1, 1, 1, 3)

    def with_control(positive):
        apply = stock.ControlNetApplyAdvanced
        empty = bench.away(positive)
        steered, negative = outputs(apply, positive, empty, adapter(), hint, 1.0, 0.0, 1.0)
        return {"positive": steered, "negative": negative if both else empty}

    on, positive = method(bench, 1)
    off, _ = method(bench, 0)
    conds = with_control(positive)
    without = bench.sample(bench.model, **conds)
    assert differ(without, bench.sample(bench.model, positive)) > 0.05, "the adapter does nothing"
    assert torch.equal(bench.sample(off, **conds), without)
    assert differ(bench.sample(on, **conds), without) > 0.05


def test_a_combined_positive(method, bench):
    """Only the rows of the edit's own prompt are edited."""
    on, positive = method(bench, 1)
    off, _ = method(bench, 0)
    combined = positive + bench.text(OTHER)
    assert torch.equal(bench.sample(off, combined), bench.sample(bench.model, combined))
    assert differ(bench.sample(on, combined), bench.sample(bench.model, combined)) > 0.05
    assert differ(bench.sample(on, combined), bench.sample(on, bench.text(OTHER) + positive)) < 1e-3


def test_a_negative_made_from_the_positive(method, bench):
    """Zeroing out keeps the positive's tag, but what is negative is not edited."""
    on, positive = method(bench, 1)
    zeroed = outputs(stock.ConditioningZeroOut, positive)[0]
    bare = [[zeroed[0][0], {k: v for k, v in zeroed[0][1].items() if k == "pooled_output"}]]
    bare = bench.away(positive, bare)
    assert torch.equal(bench.sample(on, positive, negative=zeroed), bench.sample(on, positive, negative=bare))


def test_a_step_cache_beside_it(method, bench):
    """EasyCache skips passes that change little; the source's must never be skipped."""
    on, positive = method(bench, 1)
    cached = outputs(easycache.EasyCacheNode, on, 10.0, 0.2, 0.9, False)[0]
    edited = bench.sample(cached, positive)
    assert edited.isfinite().all() and edited.shape == bench.noise["samples"].shape


def test_every_stock_sampler_node(method, bench):
    on, positive = method(bench, 1)
    reference = bench.sample(on, positive)
    empty, noise = bench.away(positive), bench.noise
    advanced = outputs(
        stock.KSamplerAdvanced, on, "disable", 0, bench.steps, bench.guidance, "euler", "ddim_uniform", positive, empty,
        noise, 0, 10000, "disable",
    )[0]["samples"]  # fmt: skip
    guider = outputs(custom.CFGGuider, on, positive, empty, bench.guidance)[0]
    quiet, euler = outputs(custom.DisableNoise)[0], outputs(custom.KSamplerSelect, "euler")[0]
    by_guider = outputs(custom.SamplerCustomAdvanced, quiet, guider, euler, bench.sigmas, noise)[0]["samples"]
    assert differ(advanced, reference) < 1e-3 and differ(by_guider, reference) < 1e-3


def test_a_longer_negative(method, bench):
    """The host repeats the shorter text to the longer one's length; the edit must not notice."""
    on, positive = method(bench, 1)
    long = bench.text(" ".join(["a red star on a white background"] * 14))
    assert long[0][0].shape[1] == 154
    half = [[long[0][0][:, :77], long[0][1]]]
    twice = [[torch.cat([half[0][0], half[0][0]], 1), long[0][1]]]
    # Attention over a text and over the same text twice is one and the same.
    twice, half = (bench.away(positive, text) for text in (twice, half))
    assert differ(bench.sample(on, positive, negative=twice), bench.sample(on, positive, negative=half)) < 1e-3


def test_an_inpainting_mask(method, bench):
    on, positive = method(bench, 1)
    off, _ = method(bench, 0)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    masked = {**bench.noise, "noise_mask": mask}
    without = bench.sample(bench.model, positive, latent=masked)
    assert torch.equal(bench.sample(off, positive, latent=masked), without)
    edited = bench.sample(on, positive, latent=masked)
    assert differ(edited[..., 9:], without[..., 9:]) > 0.05


def test_an_ip_adapter_before_and_after(method, bench):
    """Packs that call .add on what they find in a slot work in either order, and what they add stays."""
    _, positive = method(bench, 1)
    off, _ = method(bench, 0)
    alone = bench.sample(apply_ip_adapter(bench.model, 0.3), positive)
    assert torch.equal(bench.sample(apply_ip_adapter(off, 0.3), positive), alone)
    after = bench.sample(apply_ip_adapter(method(bench, 1)[0], 0.3), positive)
    before = bench.sample(method(bench, 1, model=apply_ip_adapter(bench.model, 0.3))[0], positive)
    twice = apply_ip_adapter(apply_ip_adapter(method(bench, 1)[0], 0.2), 0.1)
    assert torch.equal(after, before)
    assert differ(after, alone) > 0.05
    assert differ(after, bench.sample(method(bench, 1)[0], positive)) > 0.05
    assert differ(bench.sample(twice, positive), after) < 1e-3


def test_interrupt_leaves_nothing_behind(method, bench, plain):
    model, positive = method(bench, 1)
    whole = bench.sample(model, positive)
    unplugged = plain(positive)
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
    assert torch.equal(plain(positive), unplugged)


def test_steps_are_told_by_sigma_not_by_counting(method, bench):
    """A run that starts half-way is the second half of the whole run."""
    model, positive = method(bench, 1)
    whole = bench.sample(model, positive)
    middle = len(bench.sigmas) // 2
    first = {"samples": bench.sample(model, positive, sigmas=bench.sigmas[: middle + 1])}
    second = bench.sample(model, positive, latent=first, sigmas=bench.sigmas[middle:])
    if method is METHODS["refine, reweight and local blend"]:
        # What the first half saw of the words is lost, so the mask may differ; what was seen twice does not.
        assert torch.equal(second, bench.sample(model, positive, latent=first, sigmas=bench.sigmas[middle:]))
    else:
        assert differ(second, whole) < 1e-3


def test_half_precision(method, bench):
    """In bf16, the half precision that a CPU can run, the edit is finite and the same edit within its grain."""
    model, positive = method(bench, 1)
    exact = bench.sample(model, positive)
    half = model.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    rough = bench.sample(half, positive)
    plain_half = bench.model.clone()
    plain_half.set_model_compute_dtype(torch.bfloat16)
    grain = (bench.sample(plain_half, positive) - bench.sample(bench.model, positive)).abs().mean()
    assert (rough - exact).abs().mean() < 4 * grain + 0.02 * exact.std()
