"""Whether MODEL and CLIP are those that a trajectory was made with: what is the same, what is told and refused."""

from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.weight_adapter
import comfy_extras.nodes_attention_multiply as multiply
import comfy_extras.nodes_hooks as hooks
import comfy_extras.nodes_model_advanced as advanced
import comfy_extras.nodes_model_merging as merging
import pytest
import torch

import nodes as stock
from attune.demo import model as demo
from attune.inversion import host as runs
from attune.inversion.trajectory import TOLD, check_same_model, weight_distance
from attune.nodes import edit, invert, self_attention, tokens, view

from .bench import METHODS, SOURCE, TARGET, Bench, half, outputs, prompt_swap

OTHER = demo.WEIGHTS.with_name("attune_demo_unsupervised.safetensors")
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def bench():
    with torch.inference_mode():
        made = Bench(height=8, width=8, steps=3)
        told = replace(made.trajectory, header={**made.trajectory.header, "prompt": SOURCE, "method": "recorded"})
        made.trajectory = replace(told, conditioning=made.text(SOURCE))
        return made


@pytest.fixture(scope="module")
def other():
    return demo.load_demo(OTHER)[0]


def swap(bench, caplog, model=None, clip=None):
    """What Prompt Swap says."""
    caplog.clear()
    prompt_swap(bench if clip is None else bench.but(clip=clip), 1, model)
    return caplog.text


def rounded(patcher, dtype):
    """The MODEL or the patcher of a CLIP with all weights in another dtype."""
    for weight in patcher.model.parameters():
        weight.data = weight.data.to(dtype)
    return patcher


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_a_checkpoint_in_another_precision_is_the_same_one(bench, other, dtype):
    mine = runs.describe_model(rounded(demo.load_demo()[0], dtype))
    assert mine["dtype"] == str(dtype).removeprefix("torch.")
    assert weight_distance(bench.trajectory.header, mine) == 0
    assert not check_same_model(bench.trajectory, mine)
    coarse = runs.describe_model(rounded(demo.load_demo(OTHER)[0], dtype))
    with pytest.raises(ValueError, match="another checkpoint or merge than the MODEL's"):
        check_same_model(bench.trajectory, coarse)
    # Of files from before the dtype and the further numbers were kept, too.
    old = {k: bench.trajectory.header[k] for k in ("family", "latent_format", "prediction", "weights")}
    with pytest.raises(ValueError, match="another checkpoint or merge than the MODEL's"):
        check_same_model(replace(bench.trajectory, header=old), coarse)
    if dtype not in FP8:
        assert not check_same_model(replace(bench.trajectory, header=old), mine)


@pytest.mark.parametrize(
    "ratio,said", [(1.0, None), (0.999, None), (0.99, "a little off"), (0.9, "another"), (0.0, "another")]
)
def test_a_merge_is_another_model_by_how_much_is_merged(bench, other, caplog, ratio, said):
    merged = outputs(merging.ModelMergeSimple, bench.model, other, ratio)[0]
    if said == "another":
        with pytest.raises(ValueError, match="another checkpoint or merge than the MODEL's; .* connect the one it was"):
            swap(bench, caplog, merged)
    else:
        assert (said or "") in swap(bench, caplog, merged) and bool(caplog.text) == bool(said)


def test_a_merge_counts_as_what_the_host_makes_of_it(bench, other):
    """While it is loaded and before, within others, in some blocks only, and added or taken away."""
    comfy.model_management.unload_all_models()
    half_way = outputs(merging.ModelMergeSimple, bench.model, other, 0.5)[0]
    assert weight_distance(
        runs.describe_model(outputs(merging.ModelMergeSimple, bench.model, other, 0.0)[0]), runs.describe_model(other)
    ) == pytest.approx(0, abs=1e-6)
    for merged in (
        half_way,
        outputs(merging.ModelMergeSimple, other, half_way, 0.3)[0],
        outputs(merging.ModelMergeBlocks, bench.model, other, input=0.2, middle=1.0, out=0.7)[0],
        outputs(merging.ModelAdd, bench.model, outputs(merging.ModelSubtract, other, bench.model, 1.0)[0])[0],
    ):
        before = runs.describe_model(merged)
        merged.patch_model()
        found = {name: float(p.flatten()[0]) for name, p in merged.model.diffusion_model.named_parameters()}
        while_loaded = runs.describe_model(merged)
        merged.unpatch_model()
        biases = [value for name, value in found.items() if name.endswith(".bias")]
        assert before["probes"][: len(biases)] == pytest.approx(biases, rel=1e-4, abs=1e-6)
        assert while_loaded == before and weight_distance(before, bench.trajectory.header) > TOLD


def test_a_lora_leaves_the_model_the_same_one(bench, caplog):
    """Added after the inversion, however strong; loaded or not."""
    model, random = bench.model.clone(), torch.Generator().manual_seed(0)
    weights = {n: p for n, p in model.model.named_parameters() if p.ndim == 2 and "attn" in n}
    patches = {}
    for name, weight in weights.items():
        up, down = torch.randn(len(weight), 4, generator=random), torch.randn(4, weight.shape[1], generator=random)
        patches[name] = comfy.weight_adapter.LoRAAdapter(set(), (up * 0.05, down, 4.0, None, None, None))
    assert len(model.add_patches(patches, 1.0)) == len(weights)
    before = runs.describe_model(model)
    comfy.model_management.unload_all_models()
    model.patch_model()
    try:
        assert not torch.equal(dict(model.model.named_parameters())[name], weights[name])
        assert runs.describe_model(model) == before == runs.describe_model(bench.model)
    finally:
        model.unpatch_model()
    assert not swap(bench, caplog, model)


def test_a_node_that_scales_attention_leaves_the_model_the_same_one(bench, caplog):
    """Its effect is asked for, as a LoRA's is."""
    model = outputs(multiply.UNetCrossAttentionMultiply, bench.model, 1.2, 1.0, 0.9, 1.1)[0]
    assert runs.describe_model(model) == runs.describe_model(bench.model) and model.patches
    assert not swap(bench, caplog, model)


def test_a_merge_written_as_tensors_counts(bench, other):
    """As packs put a weighted sum together themselves, in either of the host's forms."""
    theirs = {n: p.detach() for n, p in other.model.named_parameters() if n.startswith("diffusion_model.")}
    same = outputs(merging.ModelMergeSimple, bench.model, other, 0.4)[0]
    for form in (lambda weight: (weight,), lambda weight: ("diff", (weight,))):
        model = bench.model.clone()
        model.add_patches({name: form(weight) for name, weight in theirs.items()}, 0.6, 0.4)
        assert runs.describe_model(model)["probes"] == pytest.approx(runs.describe_model(same)["probes"])


class Packed(torch.Tensor):
    """Stands for the tensors in which packs and newer hosts keep quantised weights: no number can be taken out."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            raise RuntimeError("these weights are packed")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_quantised_weights_are_not_read(bench):
    model = demo.load_demo()[0]
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            packed = module.weight.data.as_subclass(Packed)
            del module.weight
            module.register_parameter("weight", torch.nn.Parameter(packed, requires_grad=False))
    found = runs.describe_model(model)
    assert None in found["probes"] and not check_same_model(bench.trajectory, found)
    merged = outputs(merging.ModelMergeSimple, bench.model, model, 0.5)[0]
    assert None in runs.describe_model(merged)["probes"]


# ---- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling,zsnr,said",
    [("eps", False, ""), ("lcm", False, "has LCM sampling in the place of EPS"), ("eps", True, "other noise levels")],
)
def test_how_a_model_samples_is_told(bench, caplog, sampling, zsnr, said):
    model = outputs(advanced.ModelSamplingDiscrete, bench.model, sampling, zsnr)[0]
    assert said in swap(bench, caplog, model) and bool(said) == bool(caplog.text)


def ddim(bench, model, steps, grid):
    picture = {"samples": runs.host_latent(bench.trajectory, -1)}
    return outputs(invert.AttuneDDIMInversion, model, picture, bench.text(SOURCE), steps, grid, invert.LEVELS[0])


@pytest.mark.parametrize("grid", invert.GRIDS)
def test_no_more_steps_than_a_distilled_table_has_levels(bench, caplog, grid):
    lcm = outputs(advanced.ModelSamplingDiscrete, bench.model, "lcm", False)[0]
    with pytest.raises(ValueError, match="steps are 51, but the MODEL's table has 50 noise levels; set steps of"):
        ddim(bench, lcm, 51, grid)
    made = ddim(bench, lcm, 10, grid)[0]
    assert runs.falls(made.sigmas) and not torch.equal(made.noise, made.latents[-1]) and not caplog.text
    assert made.header["sampling"] == "LCM"


def test_a_grid_of_other_steps_is_told(bench, caplog):
    lcm = outputs(advanced.ModelSamplingDiscrete, bench.model, "lcm", False)[0]
    made = ddim(bench, lcm, 20, runs.HOST_GRID)[0]
    assert len(made.sigmas) == 26 and "The grid has 25 steps and not 20" in caplog.text


# ---- texts -------------------------------------------------------------------------------------------------------

ANOTHER_CLIP = "The CLIP is not the one that the TRAJECTORY was made with"


def skipping(clip):
    return outputs(stock.CLIPSetLastLayer, clip, -2)[0]


EVERY_READER = {
    "swap": lambda b, clip: prompt_swap(b.but(clip=clip), 1),
    "reweight": lambda b, clip: METHODS["prompt reweight"](b.but(clip=clip), 1),
    "blend": lambda b, clip: METHODS["swap and local blend"](b.but(clip=clip), 1),
    "free": lambda b, clip: METHODS["free prompt editing"](b.but(clip=clip), 1),
    "free without a caption": lambda b, clip: outputs(
        self_attention.AttuneFreePromptEditing, b.model, clip, b.trajectory, "", TARGET, 0.0, 0.8, 1024
    ),
    "preserving": lambda b, clip: METHODS["context preserving"](b.but(clip=clip), 1),
    "embedding control": lambda b, clip: outputs(edit.AttuneEmbeddingControl, clip, b.trajectory, SOURCE, TARGET),
    "maps": lambda b, clip: outputs(view.AttuneAttentionMaps, b.model, clip, b.trajectory, SOURCE, "", 4, 3),
    "background": lambda b, clip: outputs(
        tokens.AttuneBackgroundMask, b.model, clip, b.trajectory, SOURCE.replace("circle", "{circle}"), 0.3, 2, 16, 4,
        3, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("reader", EVERY_READER.values(), ids=EVERY_READER)
def test_another_clip_skip_is_told_wherever_the_clip_is_read(bench, caplog, reader):
    reader(bench, bench.clip)
    assert ANOTHER_CLIP not in caplog.text
    reader(bench, skipping(bench.clip))
    assert ANOTHER_CLIP in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, *FP8], ids=str)
def test_a_clip_in_another_precision_is_the_same_one(bench, caplog, dtype):
    clip = demo.load_demo()[1]
    for weight in clip.cond_stage_model.parameters():
        weight.data = weight.data.to(dtype)
    assert not torch.equal(bench.but(clip=clip).text(SOURCE)[0][0], bench.text(SOURCE)[0][0]) or dtype == torch.float16
    assert not swap(bench, caplog, clip=clip)
    assert ANOTHER_CLIP in swap(bench, caplog, clip=demo.load_demo(OTHER)[1])


def test_a_lora_on_the_clip_is_told(bench, caplog):
    """One that moves every weight by a tenth, added after the inversion."""
    clip, random = bench.clip.clone(), torch.Generator().manual_seed(0)
    weights = {n: p for n, p in clip.cond_stage_model.named_parameters() if p.ndim == 2 and "encoder" in n}
    noise = {n: torch.randn(p.shape, generator=random) * p.abs().mean() * 0.1 for n, p in weights.items()}
    assert len(clip.add_patches({name: ("diff", (step,)) for name, step in noise.items()}, 1.0)) == len(weights)
    assert not swap(bench, caplog, clip=bench.clip)
    assert ANOTHER_CLIP in swap(bench, caplog, clip=clip)


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"prompt": None}},
        {"header": {"method": "turn"}},
        {"conditioning": lambda texts: texts * 2},
        {"conditioning": lambda texts: [[torch.cat([text, text], 1), extras] for text, extras in texts]},
    ],
    ids=["no caption", "a turn", "combined", "concatenated"],
)
def test_texts_that_are_not_the_captions_alone_are_not_compared(bench, caplog, change):
    made = replace(bench.trajectory, header={**bench.trajectory.header, **change.get("header", {})})
    if "conditioning" in change:
        made = replace(made, conditioning=change["conditioning"](made.conditioning))
    prompt_swap(bench.but(clip=skipping(bench.clip)), 1, trajectory=made)
    assert ANOTHER_CLIP not in caplog.text


def test_one_more_text_at_most_is_encoded_to_compare(bench, monkeypatch):
    def encoded(source):
        seen, encode = [], bench.clip.encode_from_tokens_scheduled
        monkeypatch.setattr(
            bench.clip, "encode_from_tokens_scheduled", lambda *args, **kw: seen.append(1) or encode(*args, **kw)
        )
        prompt_swap(bench, 1, source=source)
        monkeypatch.undo()
        return len(seen)

    assert encoded(SOURCE) == 2  # source and target
    assert encoded(SOURCE.replace("red", "green")) == 3


# ---- what is on the CLIP -----------------------------------------------------------------------------------------


@pytest.fixture
def hooked(bench):
    """The CLIP with a LoRA's hook on a schedule: several texts of one prompt."""
    frames = hooks.CreateHookKeyframesInterpolated().create_hook_keyframes(0.2, 1.0, "linear", 0.0, 1.0, 4)[0]
    random = torch.Generator().manual_seed(0)
    encoder = bench.clip.cond_stage_model
    weights = {n: p for n, p in encoder.named_parameters() if "mlp" in n and p.ndim == 2}
    lora = {n: ("diff", (torch.randn(p.shape, generator=random) * 0.1,)) for n, p in weights.items()}
    group = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    group.add(hook)
    hook.weights, hook.weights_clip, hook.need_weight_init = {}, lora, False
    group = hooks.SetHookKeyframes().set_hook_keyframes(group, frames)[0]
    return outputs(hooks.SetClipHooks, clip=bench.clip, apply_to_conds=False, schedule_clip=True, hooks=group)[0]


def test_region_prompts_follow_a_scheduled_hook(bench, hooked):
    plain = [bench.but(clip=hooked).text(text) for text in (TARGET, "a star")]
    assert len(plain[0]) > 1 and not torch.equal(plain[0][0][0], plain[0][-1][0])
    model, positive = outputs(
        self_attention.AttuneRegionPrompts, bench.model, hooked, TARGET, "a star", mask_1=half()
    )  # fmt: skip
    assert len(positive) == len(plain[0])
    for (text, extras), one, other in zip(positive, *plain, strict=True):
        assert torch.equal(text, torch.cat([one[0], other[0]], 1))
        assert extras["clip_start_percent"] == one[1]["clip_start_percent"]
    assert bench.sample(model, positive).isfinite().all()


def test_embedding_control_follows_a_scheduled_hook(bench, hooked):
    positive, _ = outputs(edit.AttuneEmbeddingControl, hooked, bench.trajectory, SOURCE, TARGET)
    plain = [bench.but(clip=hooked).text(text) for text in (SOURCE, TARGET)]
    assert len(positive) == len(plain[0]) > 1
    word = 2  # "red" and "yellow"
    for (text, _), source, target in zip(positive, *plain, strict=True):
        assert torch.equal(text[:, word], target[0][:, word]) and torch.equal(text[:, -1], source[0][:, -1])
    assert bench.sample(bench.model, positive).isfinite().all()


def test_learning_under_a_scheduled_hook_is_refused(bench, hooked):
    combined = replace(bench.trajectory, conditioning=bench.but(clip=hooked).text(SOURCE))
    with pytest.raises(ValueError, match="TRAJECTORY's conditioning holds .* texts, .* a scheduled hook on its CLIP"):
        outputs(
            invert.AttuneNullTextInversion, combined, bench.model, bench.text(""), 5.0, 1, 0.01, 0.0, True
        )  # fmt: skip


class Doubled:
    """A CLIP that gives two text tokens for each, as NegPip's does: a key and a value by turns."""

    def __init__(self, clip):
        self._clip = clip

    def __getattr__(self, name):
        return getattr(self._clip, name)

    def encode_from_tokens_scheduled(self, *args, **kwargs):
        texts = self._clip.encode_from_tokens_scheduled(*args, **kwargs)
        return [[text.repeat_interleave(2, 1), extras] for text, extras in texts]


@pytest.fixture
def doubled(bench):
    model = bench.model.clone()
    model.set_model_attn2_patch(lambda q, k, v, extra: (q, k[:, 0::2], v[:, 1::2]))
    clip = Doubled(bench.clip)
    trajectory = replace(bench.trajectory, conditioning=bench.but(clip=clip).text(SOURCE))
    return bench.but(clip=clip, model=model, trajectory=trajectory)


def mutual(bench):
    return outputs(
        self_attention.AttuneMutualSelfAttention, bench.model, bench.clip, bench.trajectory, SOURCE, TARGET, 0.2, 1.0, 8
    )


@pytest.mark.parametrize(
    "method",
    [lambda b: METHODS["free prompt editing"](b, 1), lambda b: METHODS["context preserving"](b, 1), mutual],
    ids=["free prompt editing", "context preserving", "mutual self-attention"],
)
def test_methods_that_look_for_no_word_take_texts_of_any_length(bench, doubled, method):
    """As they draw on the plain CLIP, since every key and value stands there twice and is read once."""
    model, positive = method(doubled)
    mine = doubled.sample(model, positive, negative=doubled.text(""))
    model, positive = method(bench)
    assert torch.allclose(mine, bench.sample(model, positive), atol=1e-3)


@pytest.mark.parametrize(
    "method", ["prompt swap", "prompt reweight", "mutual self-attention", "region prompts", "maps"]
)
def test_methods_that_look_for_words_name_the_patch_on_the_clip(doubled, method):
    with pytest.raises(ValueError, match="gives 154 text tokens for a prompt of 77, as with a pack's patch") as error:
        EVERY_READER["maps"](doubled, doubled.clip) if method == "maps" else METHODS[method](doubled, 1)
    assert "Concat" not in str(error.value) and "connect the CLIP from before that patch" in str(error.value)
