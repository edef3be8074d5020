"""SDXL and SD 2.x, small and random: other layers, other text encoders, another prediction, the same promises.

Words that are learned in their text encoders are in test_tokens.py; test_families_parity.py has both beside diffusers.
"""

import functools
import logging
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy_extras.nodes_clip_sdxl as sdxl_nodes
import folder_paths
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from attune.attention_patches import host as patches
from attune.benchmark import families
from attune.inversion import host as runs
from attune.inversion import null_text
from attune.nodes import NODES, cache, edit, fusion, invert, mask, self_attention, tokens, trajectory, view
from attune.nodes.demo import AttuneDemoCheckpoint

from .bench import METHODS, SOURCE, TARGET, Bench, adapter, context_preserving, half, outputs

STEPS = 3
ADAPTERS = {"SDXL": ((32, 64, 64, 64), True), "SD2": ((32, 32, 64, 64), False)}  # widths and layout of theirs


class FamilyBench(Bench):
    """As the demo model's; its pictures are the demo autoencoder's, which makes no matter here."""

    def __init__(self, family):
        self.family = family
        super().__init__(height=16, width=12, guidance=3.0, steps=STEPS)

    def load(self):
        return families.model(self.family), families.clip(self.family), outputs(AttuneDemoCheckpoint)[2]


def record(bench, positive, guidance=1.0):
    """(trajectory, last latent) of a picture that Attune Record Trajectory draws from the bench's noise."""
    texts = positive, bench.text(""), runs.euler(), bench.sigmas, bench.noise
    made, drawn, *_ = outputs(invert.AttuneRecordTrajectory, bench.model, False, 0, guidance, *texts)
    return made, drawn["samples"]


@pytest.fixture(params=families.FAMILIES, scope="module")
def bench(request):
    with torch.inference_mode():
        return FamilyBench(request.param)


@pytest.fixture(scope="module")
def source(bench):
    """(trajectory, last latent) of a picture that is drawn from its caption without guidance."""
    with torch.inference_mode():
        return record(bench, bench.text(SOURCE))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """What nodes write goes here."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    return tmp_path


def differ(a, b):
    """The greatest difference, as a share of the pictures' own spread."""
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max() / b.std())


def again(bench, made, negative, guidance):
    """The last latent that a trajectory's noise and text give."""
    bench = bench.but(noise={"samples": runs.host_latent(made, 0)}, sigmas=made.sigmas)
    return bench.sample(bench.model, made.conditioning, negative=negative, guidance=guidance)


# ---- edits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_edits(bench, method, monkeypatch):
    """On, it shows, every time alike, and also where little memory makes the host run one row at a time; off, it is the
    plain run."""
    model, positive = method(bench, 1)
    plain = bench.sample(bench.model, positive)
    edited = bench.sample(model, positive)
    assert differ(edited, plain) > 0.05
    assert torch.equal(edited, bench.sample(*method(bench, 1)[:2]))
    off, positive = method(bench, 0)
    assert torch.equal(bench.sample(off, positive), bench.sample(bench.model, positive))
    model, positive = method(bench, 1)
    free = comfy.model_management.get_free_memory
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda *a, **k: (0, 0) if k.get("torch_free_too") else 0
    )
    split = bench.sample(model, positive)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    assert differ(split, edited) < 1e-3


SIZED = {"width": 512, "height": 640, "crop_w": 64, "crop_h": 8, "target_width": 256, "target_height": 384}


@pytest.mark.parametrize("node", ["swap", "free prompt editing", "embedding control"])
def test_reading_the_very_run_that_is_drawn_gives_that_run(bench, node):
    """Also where SDXL was told sizes of its own: the edit's texts are told the same."""
    text, prompts = bench.text(SOURCE), (SOURCE, SOURCE)
    if bench.family == "SDXL":
        text = outputs(sdxl_nodes.CLIPTextEncodeSDXL, bench.clip, *SIZED.values(), SOURCE, SOURCE)[0]
        unsized = record(bench, bench.text(SOURCE))[1]
    made, drawn = record(bench, text)
    if node == "swap":
        settings = 0.0, 1.0, 0.0, 1.0, 1024
        model, positive = outputs(edit.AttunePromptSwap, bench.model, bench.clip, made, *prompts, *settings)
    elif node == "free prompt editing":
        settings = 0.0, 1.0, 1024
        model, positive = outputs(
            self_attention.AttuneFreePromptEditing, bench.model, bench.clip, made, *prompts, *settings
        )
    else:
        model, positive = bench.model, outputs(edit.AttuneEmbeddingControl, bench.clip, made, *prompts)[0]
    assert differ(bench.sample(model, positive, guidance=1.0), drawn) < 1e-3
    assert bench.family == "SD2" or differ(unsized, drawn) > 0.1


def test_a_cached_source_is_the_same_source(bench):
    plain, positive = METHODS["prompt swap"](bench, 1)
    cached = outputs(cache.AttuneFeatureCache, bench.model, 64)[0]
    expected, shown = bench.sample(plain, positive), []
    unet = bench.model.model.diffusion_model
    handle = unet.register_forward_pre_hook(lambda _, args: shown.append(len(args[0])))
    try:
        for passes in (2 * STEPS, STEPS):
            shown.clear()
            assert differ(bench.sample(METHODS["prompt swap"](bench, 1, model=cached)[0], positive), expected) < 1e-3
            assert len(shown) == passes
    finally:
        handle.remove()


# ---- inversions --------------------------------------------------------------------------------------------------


def test_ddim_inversion(bench, source):
    """Without guidance the picture comes back, and with refinement more nearly."""
    _, drawn = source
    settings = bench.text(SOURCE), STEPS, invert.GRIDS[0], invert.LEVELS[0]
    apart = []
    for refine in (0, 8):
        made = outputs(invert.AttuneDDIMInversion, bench.model, {"samples": drawn}, *settings, refine)[0]
        apart.append(differ(again(bench, made, bench.text(""), 1.0), drawn))
    assert apart[1] < apart[0] / 2


def test_the_picture_comes_back_under_guidance(bench, source, folders):
    """Not by itself; better with null embeddings, and exactly with the caption as the negative. A file keeps it all."""
    made, picture = source
    empty = bench.text("")
    assert differ(again(bench, made, empty, 1.0), picture) < 1e-3
    free = differ(again(bench, made, empty, 3.0), picture)
    learned, null = outputs(invert.AttuneNullTextInversion, made, bench.model, empty, 3.0, 10, 0.05, 0.0, True)
    close = differ(again(bench, made, null, 3.0), picture)
    assert free > 0.1 and close < free / 2
    prompted, negative = outputs(invert.AttuneNegativePromptInversion, made)
    assert differ(again(bench, prompted, negative, 3.0), picture) < 1e-3
    (name,) = outputs(trajectory.AttuneSaveTrajectory, learned, "family")
    read, _ = outputs(trajectory.AttuneLoadTrajectory, name)
    positive, negative = outputs(trajectory.AttuneTrajectoryConditioning, read)
    assert torch.equal(again(bench, read, negative, 3.0), again(bench, learned, null, 3.0))
    assert all(torch.equal(positive[0][1][k], v) for k, v in bench.text(SOURCE)[0][1].items() if torch.is_tensor(v))
    assert read.header["prediction"] == {"SDXL": "EPS", "SD2": "V_PREDICTION"}[bench.family]


def test_ablations_and_report(bench, source):
    made, picture = source
    empty = bench.text("")
    assert torch.equal(outputs(invert.AttuneDirectInversion, made, 1, 1.0, 3.0)[0].latents, made.latents)
    loose = outputs(invert.AttuneDirectInversion, made, 2, 0.5, 3.0, bench.model, empty)[0]
    assert differ(loose.latents[-1], made.latents[-1]) > 0.05
    image = bench.vae.decode(picture)
    verdict, table, sheet = outputs(trajectory.AttuneInversionReport, made, bench.model, bench.vae, image, 3.0, empty)
    assert verdict and "| guidance 3 |" in table and sheet.isfinite().all()


def test_null_embeddings_of_a_batch(bench):
    """Each picture's own pooled text goes along where only some of a batch are still learning."""
    sigmas = torch.tensor([4.0, 2.0])
    latents = torch.randn(2, 2, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    (text, extras), (other, others) = (bench.text(prompt)[0] for prompt in ("", TARGET))
    text, pooled = torch.cat([text, other]), torch.cat([extras["pooled_output"], others["pooled_output"]])

    def learned(rows, tolerance=0.0):
        settings = null_text.NullText(3.0, inner=4, rate=0.05, tolerance=tolerance)
        own = [[text[rows], {"pooled_output": pooled[rows]}]]

        def body(network, start, report):
            path, null = latents[:, rows].clone(), own[0][0].clone()
            first = null_text.begin(path)
            *_, last = null_text.learn(settings, network.denoise, sigmas, path, null, first, lambda *_: 0)
            return last.nulls[0], last.losses[0]

        return runs.learn(bench.model, bench.text("x"), own, latents[-1, rows], 1, body)

    _, (one, two) = learned([0, 1])
    assert one[-1] < one[0] and two[-1] < two[0]
    bound = (one[0] + two[0]) / 2  # stops one of them at once
    both, losses = learned([0, 1], bound)
    assert min(map(len, losses)) == 1 < max(map(len, losses))
    for i in range(2):
        assert (learned([i], bound)[0][0] - both[i]).abs().mean() < 1e-3


# ---- seeing ------------------------------------------------------------------------------------------------------


def test_every_layer_is_seen_once(bench):
    seen = []
    recorder = patches.recording(bench.model, lambda place, own, heads: seen.append((place.layer, place.number)))
    picture = torch.randn(1, 4, 16, 12)
    runs.walk(recorder, bench.text(SOURCE), picture, bench.sigmas[:2], lambda d, x, report: d(x, 1.0))
    count = families.LAYERS[bench.family]
    assert len(set(seen)) == len(seen) == 2 * count
    assert [number for _, number in seen] == [n for n in range(count) for _ in ("self", "cross")]


def test_views(bench, source):
    made, _ = source
    given = bench.model, bench.clip, made
    maps = functools.partial(outputs, view.AttuneAttentionMaps, *given, SOURCE, "circle, square", 48, 2)
    sheet, found, white = maps(layers=view.maps.EACH, mask_word="circle")
    assert len(found.layers) == families.LAYERS[bench.family]
    assert white.shape == (1, 128, 96) and sheet.isfinite().all()
    last = families.LAYERS[bench.family] - 1
    with pytest.raises(ValueError, match=f"has {last + 1} layers of cross-attention, 0 to {last}"):
        maps(layer=last + 1)
    components, parts, masks = outputs(view.AttuneSelfAttentionView, bench.model, made, 48, 2, "PCA", 3, 3, 0)
    assert masks.shape == (3, 128, 96) and torch.equal(masks.sum(0), torch.ones(128, 96))
    braces = "a red {circle} and a blue {square} on a gray background"
    background, objects, _ = outputs(tokens.AttuneBackgroundMask, *given, braces, 0.2, 3, 48, 48, 2, 0)
    assert background.shape == (1, 128, 96) and objects.shape == (2, 128, 96)


def test_a_mask_that_is_found_while_drawing(bench):
    follow = outputs(mask.AttuneMaskRefinement, "circle", 0.3, "standard deviations", 1.0, 0, 48)[0]
    model, positive = context_preserving(bench, 1, source_mask=half(), refinement=follow)
    drawn = bench.sample(model, positive)
    given = bench.sample(*context_preserving(bench, 1, source_mask=half())[:2])
    assert differ(drawn, given) > 0.05
    found, _ = outputs(mask.AttuneRefinedMask, follow, {"samples": drawn}, 64)
    assert found.shape == (1, 128, 96) and 0 < found.mean() < 1


# SDXL as it is published: 70 layers, of which 60 have 32x32 picture tokens at 1024 pixels, and 10 have 64x64.
REAL_SDXL = families.SDXL | {
    "model_channels": 320,
    "num_head_channels": 64,
    "context_dim": 2048,
    "channel_mult": (1, 2, 4),
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "adm_in_channels": 2816,
}


def test_the_layers_of_the_real_sdxl():
    unet = UNetModel(**REAL_SDXL, device="meta", dtype=torch.float16, operations=comfy.ops.disable_weight_init)
    layers = patches._grids(unet, 128, 128)
    fine = {("input", 4), ("input", 5), ("output", 3), ("output", 4), ("output", 5)}
    assert len(layers) == 70
    assert all(grid == ((64, 64) if block in fine else (32, 32)) for (block, _), grid in layers.items())
    starts = [number for number, (_, depth) in enumerate(layers) if depth == 0]
    assert starts == [0, 2, 4, 14, 24, 34, 44, 54, 64, 66, 68]
    # In every size that SDXL was trained at, the default token limit takes in the coarser level.
    for width, height in ((1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640)):
        grids = patches._grids(unet, height // 8, width // 8).values()
        assert sum(h * w <= 1024 for h, w in grids) == 60


def test_settings_that_do_nothing_in_this_model_are_told(bench, caplog):
    """SDXL has no 16x16 layers at its own size, and its way up begins at another number."""
    fewest = patches.fewest_tokens(bench.model, (16, 12))
    free = functools.partial(
        outputs, self_attention.AttuneFreePromptEditing, bench.model, bench.clip, bench.trajectory, SOURCE, TARGET
    )
    swap = functools.partial(
        outputs, edit.AttunePromptSwap, bench.model, bench.clip, bench.trajectory, SOURCE, TARGET, 0.0, 0.8, 0.0
    )
    both = functools.partial(
        outputs, self_attention.AttuneMutualSelfAttention, bench.model, bench.clip, bench.trajectory, "", TARGET, 0, 1
    )
    with caplog.at_level(logging.WARNING, "attune"):
        free(0.0, 0.8, fewest)
        free(0.0, 0.8, 0)  # asked for
        free(0.5, 0.5, fewest - 1)
        swap(0.0, fewest - 1)
        parts = patches.parts_of_layers(bench.model)
        both(parts.index("middle"))
        assert not caplog.records
        free(0.0, 0.8, fewest - 1)
        swap(0.4, fewest - 1)
        both(parts.index("middle") - 1)
        told = [record.message for record in caplog.records]
    assert len(told) == 3 and all(f"have {fewest}; raise token_limit" in text for text in told[:2])
    assert f"begins at layer {parts.index('output')} of this MODEL, so raise layer" in told[2]


# ---- in a mask, from a sketch ------------------------------------------------------------------------------------

FUSED = 0.0, 1.0, 2  # start, end, layer


def fused(bench, made):
    model, positive, negative, latent, sigmas = made
    return bench.sample(model, positive, latent, negative=negative, sigmas=sigmas)


@pytest.mark.parametrize("masked", [False, True], ids=["whole picture", "mask"])
def test_source_fusion(bench, source, masked):
    """It steers; and with the source's text for target and negative it is the source again."""
    made, drawn = source
    settings = {"layer": 2, "mask": half() if masked else None}
    target, empty = bench.text(TARGET), bench.text("")
    on, off = (
        outputs(fusion.AttuneSourceFusion, bench.model, made, target, empty, start=0.0, end=end, **settings)
        for end in (1.0, 0.0)
    )
    plain = fused(bench, off)
    assert differ(fused(bench, on), plain) > 0.1
    assert torch.equal(plain, fused(bench, (bench.model, *off[1:])))
    text, made = made.conditioning, replace(made, negative=[])
    same = outputs(fusion.AttuneSourceFusion, bench.model, made, text, text, start=0.0, end=1.0, **settings)
    assert differ(fused(bench, same), drawn) < 1e-3


def intermediate(bench, made, control, strength=1.0):
    torch.manual_seed(5)
    hint = (torch.rand(1, 128, 96, 1) > 0.9).float().repeat(1, 1, 1, 3)
    return outputs(
        fusion.AttuneIntermediate, bench.model, made, bench.text(TARGET), bench.text(""), control, hint, half(),
        bench.vae, 0, 3.0, strength, 0.0, 1.0, fusion.BOTH, fusion.NOISES[0], *FUSED,
    )  # fmt: skip


def test_a_turn_from_a_sketch(bench, source):
    """An adapter of the family leads the intermediate, masked fusion reads it, and the next turn goes on from there."""
    made, drawn = source
    channels, xl = ADAPTERS[bench.family]
    led, unled = (intermediate(bench, made, adapter(channels=channels, xl=xl), s)[0] for s in (1.0, 0.0))
    assert differ(led.latents[-1], unled.latents[-1]) > 0.01
    both = [outputs(fusion.AttuneMaskedFusion, bench.model, made, one, half(), *FUSED) for one in (led, unled)]
    pictures = [fused(bench, one) for one in both]
    assert differ(*pictures) > 0.01
    model, positive, negative, latent, sigmas = both[0]
    edited, last, *_ = outputs(
        invert.AttuneRecordTrajectory, model, False, 0, 3.0, positive, negative, runs.euler(), sigmas, latent
    )
    assert torch.equal(last["samples"], pictures[0])
    image = bench.vae.decode(drawn)
    finished, shown, _, _ = outputs(fusion.AttuneNextTurn, made, edited, half(), image, bench.vae, 4)
    assert torch.equal(shown[:, :, :24], image[:, :, :24])  # left of the mask
    following = outputs(
        fusion.AttuneSourceFusion, bench.model, finished, bench.text(SOURCE), bench.text(""), 0.0, 1.0, 2, half()
    )
    assert differ(fused(bench, following), pictures[0]) > 0.05


def test_an_adapter_of_another_family_is_refused(bench, source):
    """By its widths, and by its layout where they are right."""
    channels, xl = ADAPTERS[bench.family]
    made, _ = source
    for layout in (False, True):
        with pytest.raises(ValueError, match=r"The CONTROL_NET is a T2I-Adapter of widths \[320.* Attune Intermediate"):
            intermediate(bench, made, adapter(channels=(320, 640, 1280, 1280), xl=layout))
    with pytest.raises(ValueError, match="T2I-Adapter"):
        intermediate(bench, made, adapter(channels=channels, xl=not xl))


# ---- what does not go together -----------------------------------------------------------------------------------


def test_models_and_texts_of_two_families(bench):
    """A trajectory, or a CLIP, of another family than the MODEL's."""
    demo = outputs(AttuneDemoCheckpoint)
    prompts = SOURCE, TARGET, 0.0, 0.8, 0.0, 0.4, 1024
    with pytest.raises(ValueError, match="TRAJECTORY was made with model family .* but the MODEL is SD15"):
        outputs(edit.AttunePromptSwap, demo[0], demo[1], bench.trajectory, *prompts)
    wrong = r"another model family \(its texts are 128 wide, the MODEL needs 48\); connect the CLIP"
    picture = {"samples": torch.zeros(1, 4, 16, 12)}
    mine, theirs, made = bench.model, demo[1], bench.trajectory
    caption = bench.but(clip=theirs).text(SOURCE)
    for attempt in (
        lambda: outputs(edit.AttunePromptSwap, mine, theirs, made, *prompts),
        lambda: outputs(self_attention.AttuneFreePromptEditing, mine, theirs, made, "", TARGET, 0.0, 0.8, 1024),
        lambda: outputs(self_attention.AttuneRegionPrompts, mine, theirs, SOURCE, "a star", mask_1=half()),
        lambda: outputs(invert.AttuneDDIMInversion, mine, picture, caption, 4, invert.GRIDS[0], invert.LEVELS[0]),
        lambda: record(bench, caption),
        lambda: outputs(view.AttuneAttentionMaps, mine, theirs, made, SOURCE, "", 48, 2),
    ):
        with pytest.raises(ValueError, match=wrong):
            attempt()


def test_inpainting_models(bench):
    """Nine channels in place of four; the edit shows, and off it is the plain run."""
    painter = bench.but(model=families.model(bench.family, in_channels=9))
    painter.trajectory = painter.record(SOURCE, painter.guidance)
    assert painter.model.model.diffusion_model.in_channels == 9
    for method in (METHODS["prompt swap"], METHODS["mutual self-attention"]):
        model, positive = method(painter, 1)
        assert differ(painter.sample(model, positive), painter.sample(painter.model, positive)) > 0.1
        off, positive = method(painter, 0)
        assert torch.equal(painter.sample(off, positive), painter.sample(painter.model, positive))


def of_another_kind(kind, settings):
    """A MODEL of the host's own class, without memory for its weights."""
    config = kind({})
    config.unet_config = dict(settings)
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, device=torch.device("meta"))
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


TRANSFORMERS = "but Attune steers the attention of Stable Diffusion UNets"
PICTURES = "SVD are), but Attune edits with models that generate from text alone and with inpainting models"
MMDIT = {
    "input_size": None, "patch_size": 2, "in_channels": 16, "depth": 1, "pos_embed_max_size": 32,
    "adm_in_channels": 64, "context_embedder_config": {
        "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 64}
    },
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 32,
    "context_in_dim": 32, "hidden_size": 128, "mlp_ratio": 2.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": False,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 128,
    "num_layers": 1, "patch_size": (1, 2, 2), "freq_dim": 32, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16,
}  # fmt: skip
VIDEO = families.SD2 | {
    "in_channels": 8, "adm_in_channels": 768, "num_classes": "sequential", "use_temporal_attention": True,
    "use_temporal_resblock": True, "video_kernel_size": [3, 1, 1], "use_spatial_context": True,
    "extra_ff_mix_layer": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
}  # fmt: skip
OTHERS = {
    "SD3": (comfy.supported_models.SD3, MMDIT, "OpenAISignatureMMDITWrapper", TRANSFORMERS),
    "Flux": (comfy.supported_models.Flux, FLUX, "Flux", TRANSFORMERS),
    "Cascade": (comfy.supported_models.Stable_Cascade_C, {"stable_cascade_stage": "c"}, "StageC", TRANSFORMERS),
    "Wan": (comfy.supported_models.WAN21_T2V, WAN, "WanModel", TRANSFORMERS),
    "SVD": (comfy.supported_models.SVD_img2vid, VIDEO, "SVD_img2vid", PICTURES),
    "InstructPix2Pix": (
        comfy.supported_models.SD15_instructpix2pix, families.SD2 | {"in_channels": 8}, "SD15_instructpix2pix",
        PICTURES,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plugged():
    """Every node of the pack that takes a MODEL, with what belongs into all of its inputs."""
    with torch.inference_mode():
        bench = Bench(steps=2)
        text = bench.text(SOURCE)
        made = record(bench, text)[0]
        sockets = {
            "MODEL": bench.model, "CLIP": bench.clip, "VAE": bench.vae, "CONDITIONING": text, "LATENT": bench.noise,
            "MASK": half(), "IMAGE": torch.zeros(1, 128, 128, 3), "CONTROL_NET": adapter(), "SIGMAS": bench.sigmas,
            "SAMPLER": runs.euler(), "ATTUNE_TRAJECTORY": made, "ATTUNE_REFINEMENT": None,
        }  # fmt: skip
    found = {}
    for node in NODES:
        inputs = node.define_schema().inputs
        if "MODEL" in [one.get_io_type() for one in inputs]:
            kinds = {one.id: (one.get_io_type(), one) for one in inputs}
            found[node] = {
                name: sockets.get(kind, getattr(one, "default", None)) for name, (kind, one) in kinds.items()
            }
    found[invert.AttuneDirectInversion]["every"] = 2  # with 1 it has no use for a MODEL
    return found


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_refused_in_one_sentence(family, plugged):
    """By every node that takes a MODEL, whatever else is connected."""
    kind, settings, name, why = OTHERS[family]
    model = of_another_kind(kind, settings)
    assert len(plugged) > 15
    for node, given in plugged.items():
        try:
            outputs(node, **given | {"model": model})
            said = "nothing"
        except ValueError as error:
            said = str(error)
        assert said.startswith(f"The MODEL is a {name}") and why in said and ". " not in said.replace("SD 1.x", ""), (
            node
        )
