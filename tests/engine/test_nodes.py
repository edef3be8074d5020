"""The nodes on real MODELs: what they give, and what they say when they cannot."""

import re
from dataclasses import replace

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy_extras.nodes_model_advanced as advanced
import pytest
import torch

import nodes as stock
from attune.demo import model as demo_model
from attune.inversion import ddim
from attune.inversion import host as runs
from attune.nodes.demo import AttuneDemoCheckpoint, AttuneDemoScene
from attune.nodes.edit import AttunePromptRefine, AttunePromptSwap
from attune.nodes.invert import GRIDS, LEVELS, AttuneDDIMInversion
from attune.nodes.view import AttuneAttentionMaps, AttuneContactSheet

from .bench import SOURCE, TARGET, Bench, outputs, prompt_swap


@pytest.fixture(scope="module")
def picture():
    return outputs(AttuneDemoScene, SOURCE, 3, 128)


def invert(bench, latent, steps=5, grid=GRIDS[0], level=LEVELS[0], prompt=SOURCE, model=None):
    return outputs(AttuneDDIMInversion, model or bench.model, latent, bench.text(prompt), steps, grid, level)


# ---- demo --------------------------------------------------------------------------------------------------------


def test_demo_checkpoint_leaves_the_hosts_model_list_alone():
    before = list(comfy.supported_models.models)
    outputs(AttuneDemoCheckpoint)
    assert comfy.supported_models.models == before


def test_stock_nodes_take_the_demo_checkpoint(bench, picture):
    image, masks, caption = picture
    assert image.shape == (1, 128, 128, 3) and masks.shape == (2, 128, 128) and caption == SOURCE
    latent = outputs(stock.VAEEncode, bench.vae, image)[0]
    assert latent["samples"].shape == (1, 4, 16, 16)
    assert 0.2 < float(runs.to_model_scale(bench.model, latent["samples"]).std()) < 2
    back = outputs(stock.VAEDecode, bench.vae, latent)[0]
    assert back.shape == image.shape and (back - image).square().mean() < 0.003
    tiled = outputs(stock.VAEDecodeTiled, bench.vae, latent, 128, 32)[0]
    assert (tiled - back).abs().mean() < 0.02
    drawn = outputs(
        stock.KSampler, bench.model, 0, 4, 5.0, "dpmpp_2m", "karras", bench.text(SOURCE), bench.text(""), latent, 0.5
    )[0]
    assert drawn["samples"].isfinite().all()
    assert len(list(bench.model.model.diffusion_model.named_modules())) > 0
    blocks = [n for n, _ in bench.model.model.diffusion_model.named_modules() if n.endswith("transformer_blocks.0")]
    assert len(blocks) == 16


def test_a_lora_like_patch_on_the_demo_model(bench):
    """Weights patched by the host, as a LoRA does it, take part in the edit and are gone afterwards."""
    key = "diffusion_model.out.2.weight"
    before = bench.model.model.diffusion_model.out[2].weight.clone()
    patched = bench.model.clone()
    patched.add_patches({key: (torch.full_like(before, 0.05),)}, 1.0)
    model, positive = prompt_swap(bench, 1, model=patched)
    changed = bench.sample(model, positive)
    plain = bench.sample(prompt_swap(bench, 1)[0], positive)
    assert (changed - plain).abs().max() > 0.01
    assert torch.equal(bench.model.model.diffusion_model.out[2].weight, before)


@pytest.mark.parametrize("damage", ["short", "text", "missing", "wrong keys", "wrong shapes"])
def test_damaged_weights_are_named(tmp_path, damage):
    path = tmp_path / "attune_demo.safetensors"
    if damage == "short":
        path.write_bytes(demo_model.WEIGHTS.read_bytes()[:1000])
    elif damage == "text":
        path.write_text("not weights")
    elif damage == "wrong keys":
        from safetensors.torch import save_file

        save_file({"unet.x": torch.zeros(1)}, path)
    elif damage == "wrong shapes":
        from safetensors.torch import load_file, save_file

        save_file({k: v[:1] for k, v in load_file(demo_model.WEIGHTS).items()}, path)
    with pytest.raises(
        ValueError, match="demo weights attune_demo.safetensors cannot be read .* Attune Demo Checkpoint"
    ):
        demo_model.load_demo(path)


def test_words_the_demo_model_never_learned_are_one(bench):
    known, other, another = (bench.text(p)[0][0] for p in ("a red circle", "a zebra circle", "a house circle"))
    assert torch.equal(other, another) and not torch.equal(known, other)


# ---- inversion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("level", LEVELS)
def test_inversion_is_finite_and_exact_at_the_grid(bench, picture, grid, level):
    latent = outputs(stock.VAEEncode, bench.vae, picture[0])[0]
    trajectory, noise, sigmas = invert(bench, latent, grid=grid, level=level)
    assert trajectory.latents.isfinite().all() and torch.equal(trajectory.sigmas, sigmas)
    assert len(trajectory.latents) == len(sigmas)
    start = runs.to_model_scale(bench.model, latent["samples"])
    # The papers' latent is their z of the last level, which on their grid is not 0.
    assert torch.allclose(trajectory.latents[-1] / (1 + sigmas[-1] ** 2).sqrt(), start)
    assert torch.equal(trajectory.latents[-1], start) == (grid == runs.HOST_GRID)
    assert torch.allclose(runs.to_model_scale(bench.model, noise["samples"]), trajectory.noise, atol=1e-5)
    assert 0.5 < float((trajectory.noise / sigmas[0]).std()) < 2
    reference = patches_reference(trajectory)
    for i, sigma in enumerate(sigmas[:-1]):
        assert reference.step(float(sigma)) == i
        assert torch.equal(reference.latent(float(sigma)), trajectory.latents[i])
    between = reference.latent(float(sigmas[0] + sigmas[1]) / 2)
    assert torch.allclose(between, (trajectory.latents[0] + trajectory.latents[1]) / 2, atol=1e-4)


def patches_reference(trajectory):
    from attune.attention_patches.reference import Reference

    return Reference("source", trajectory.sigmas, trajectory.latents, [], trajectory.steps)


def test_host_grid_is_the_hosts(bench):
    import comfy.samplers

    for steps in (5, 20, 30, 50):
        stock_grid = comfy.samplers.calculate_sigmas(
            bench.model.get_model_object("model_sampling"), "ddim_uniform", steps
        )
        assert torch.equal(runs.schedule(bench.model, steps, runs.HOST_GRID), stock_grid.float())


def test_inversion_comes_back(bench, picture):
    latent = outputs(stock.VAEEncode, bench.vae, picture[0])[0]
    _, noise, sigmas = invert(bench, latent, steps=20)
    back = bench.sample(bench.model, bench.text(SOURCE), latent=noise, sigmas=sigmas, guidance=1.0)
    decoded = outputs(stock.VAEDecode, bench.vae, {"samples": back})[0]
    assert (decoded - outputs(stock.VAEDecode, bench.vae, latent)[0]).square().mean() < 10**-2.2


def test_a_batch_and_an_odd_size(bench):
    torch.manual_seed(0)
    latent = {"samples": torch.randn(2, 4, 11, 17) * 4, "noise_mask": torch.ones(1, 1, 88, 136)}
    trajectory, noise, _ = invert(bench, latent)
    assert noise["samples"].shape == (2, 4, 11, 17) and "noise_mask" not in noise
    single, _, _ = invert(bench, {"samples": latent["samples"][1:]})
    assert torch.allclose(trajectory.latents[:, 1:], single.latents, atol=2e-3)


def test_an_empty_latent_is_a_gray_picture(bench):
    assert invert(bench, {"samples": torch.zeros(1, 4, 16, 16)})[0].latents.isfinite().all()


def test_inversion_matches_the_papers_step(bench, picture):
    """One step by hand: the network sees the low level's latent with the high level's timestep."""
    latent = outputs(stock.VAEEncode, bench.vae, picture[0])[0]
    trajectory, _, sigmas = invert(bench, latent, grid=runs.PAPERS_GRID, level=ddim.LATER)
    low, high = float(sigmas[-1]), float(sigmas[-2])
    x = trajectory.latents[-1]
    unet, sampling = bench.model.model.diffusion_model, bench.model.get_model_object("model_sampling")
    eps = unet(x / (1 + low**2) ** 0.5, sampling.timestep(torch.tensor([high])), bench.text(SOURCE)[0][0])
    assert torch.allclose(trajectory.latents[-2], x + (high - low) * eps, atol=1e-4)


# ---- seeing ------------------------------------------------------------------------------------------------------


def test_maps_find_the_objects(bench, picture):
    latent = outputs(stock.VAEEncode, bench.vae, picture[0])[0]
    trajectory, _, _ = invert(bench, latent, steps=10)
    sheet = outputs(AttuneAttentionMaps, bench.model, bench.clip, trajectory, SOURCE, "", 256, 2)[0]
    assert sheet.shape[0] == 1 and sheet.shape[-1] == 3 and float(sheet.std()) > 0.05
    one = outputs(AttuneAttentionMaps, bench.model, bench.clip, trajectory, SOURCE, "red, a", 256, 2)[0]
    assert one.shape[2] < sheet.shape[2]  # "red" once and "a" three times
    assert not [k for k in bench.model.wrappers if k]


def test_contact_sheet_takes_what_comes(picture):
    image = picture[0]
    wide = torch.rand(1, 30, 300, 3)
    sheet = outputs(AttuneContactSheet, image, "one\ntwo", 128, image_2=torch.rand(2, 64, 200, 3), wide=wide)[0]
    assert sheet.shape[0] == 1 and sheet.shape[2] > 128 * 6


# ---- what bad input gets -----------------------------------------------------------------------------------------


def swap(bench, source=SOURCE, target=TARGET, trajectory=None, model=None, windows=(0.0, 0.8, 0.0, 0.4)):
    return outputs(
        AttunePromptSwap,
        model or bench.model,
        bench.clip,
        trajectory or bench.trajectory,
        source,
        target,
        *windows,
        1024,
    )


def one_sentence(error, *parts):
    text = str(error.value)
    for part in parts:
        assert re.search(part, text), text
    assert "\n" not in text and text.endswith(".")


def test_prompts_of_different_length(bench):
    with pytest.raises(ValueError) as error:
        swap(bench, target="a big yellow circle and a blue square on a gray background")
    one_sentence(error, "11 words and the target prompt 12", '"red" -> "big yellow"', "Attune Prompt Swap")


@pytest.mark.parametrize("windows", [(0.5, 0.2, 0, 0.4), (0, 0.8, 0.3, 0.1)], ids=str)
def test_reversed_and_negative_windows(bench, windows):
    with pytest.raises(ValueError) as error:
        swap(bench, windows=windows)
    one_sentence(error, "(cross|self)_start to (cross|self)_end is", "0 <= start <= end <= 1", "Attune node")
    with pytest.raises(ValueError) as error:
        swap(bench, windows=(-0.1, *windows[1:]))
    one_sentence(error, "cross_start of Attune Prompt Swap is -0.1, but needs a number from 0 to 1")


def test_a_trajectory_of_another_model(bench):
    other = bench.model.clone()
    weights = {k: v.clone() for k, v in bench.model.model.diffusion_model.state_dict().items()}
    weights |= {k: v + 0.3 for k, v in weights.items() if k.endswith("bias")}
    other = demo_model.load_model(weights)
    with pytest.raises(ValueError) as error:
        swap(bench, model=other)
    one_sentence(error, "another checkpoint", "invert the picture again")
    with pytest.raises(ValueError, match="another checkpoint"):
        outputs(AttuneAttentionMaps, other, bench.clip, bench.trajectory, SOURCE, "", 256, 5)


def test_a_trajectory_of_another_prediction_type(bench):
    other = outputs(advanced.ModelSamplingDiscrete, bench.model, "v_prediction", False)[0]
    with pytest.raises(ValueError) as error:
        swap(bench, model=other)
    one_sentence(error, "prediction type EPS, but the MODEL is V_PREDICTION")


def test_a_model_is_itself_whatever_is_loaded(bench):
    """A LoRA or merge that changes the probed weights is in them while loaded, and out of them after."""
    patched = bench.model.clone()
    biases = [n for n, p in bench.model.model.named_parameters() if n.endswith("bias") and p.ndim == 1]
    weights = dict(bench.model.model.named_parameters())
    patched.add_patches({n: (torch.ones_like(weights[n]),) for n in biases}, 1.0)
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    trajectory = invert(bench, latent, model=patched)[0]
    comfy.model_management.unload_all_models()
    swap(bench, model=patched, trajectory=trajectory)
    assert trajectory.header["weights"] == runs.describe_model(bench.model)["weights"]


def test_a_start_of_another_size_count_or_noise(bench):
    model, positive = swap(bench)
    with pytest.raises(ValueError) as error:
        bench.sample(model, positive, latent={"samples": torch.zeros(1, 4, 24, 16)})
    one_sentence(error, "128x128 pixels", "128x192 pixels", "connect the LATENT")
    with pytest.raises(ValueError) as error:
        both = Bench(batch=2)
        bench.sample(
            swap(bench, trajectory=both.trajectory)[0], positive, latent={"samples": torch.zeros(3, 4, 16, 16)}
        )
    one_sentence(error, "holds 2 pictures", "draws 3")
    with pytest.raises(ValueError) as error:
        bench.sample(model, positive, sigmas=bench.sigmas * 2)
    one_sentence(error, "starts at sigma", "connect the sigmas")


def test_another_positive(bench):
    model, _ = swap(bench)
    with pytest.raises(ValueError) as error:
        bench.sample(model, bench.text(TARGET))
    one_sentence(error, TARGET, "sampler's positive input")


def test_a_lengthened_positive_and_an_area(bench):
    model, positive = swap(bench)
    longer = outputs(stock.ConditioningConcat, positive, bench.text("more"))[0]
    with pytest.raises(ValueError) as error:
        bench.sample(model, longer)
    one_sentence(error, "154 text tokens", "Concat")
    area = outputs(stock.ConditioningSetArea, positive, 64, 64, 0, 0, 1.0)[0]
    with pytest.raises(ValueError) as error:
        bench.sample(model, area)
    one_sentence(error, "Set Mask", "set_cond_area")
    with pytest.raises(ValueError, match="set to an area"):
        elsewhere = outputs(stock.ConditioningSetArea, bench.text(""), 64, 64, 0, 0, 1.0)[0]
        bench.sample(model, positive, negative=elsewhere)


def test_two_sources_on_one_model(bench):
    model, _ = swap(bench)
    other = Bench()
    once_more = "a green circle and a blue square on a gray background"
    swap(bench, model=model, trajectory=other.trajectory, target=once_more)  # the same run made twice is the same
    other.noise["samples"] = other.noise["samples"].flip(-1)
    for trajectory, source in ((other.record(SOURCE, 1.0), SOURCE), (bench.trajectory, TARGET)):
        with pytest.raises(ValueError) as error:
            swap(bench, model=model, trajectory=trajectory, source=source)
        one_sentence(error, "must share one TRAJECTORY and source prompt")


def test_looking_through_an_edit(bench):
    model, _ = swap(bench)
    with pytest.raises(ValueError) as error:
        invert(bench, {"samples": torch.zeros(1, 4, 16, 16)}, model=model)
    one_sentence(error, "MODEL from before the edit")


def test_another_caption_is_said(bench, caplog):
    other = replace(bench.trajectory, header={**bench.trajectory.header, "prompt": "a red square"})
    swap(bench, trajectory=bench.trajectory)
    assert not caplog.records
    swap(bench, trajectory=other)
    assert 'was inverted with "a red square", but the source prompt is' in caplog.text


@pytest.mark.parametrize("target, told", [
    ("a circle and a blue square on a dark gray background", 'puts "circle" where "red" was, "and" where "circle" '),
    ("a blue circle and a red square on a gray background", None),
])  # fmt: skip
def test_a_swap_that_shifts_words_is_said(bench, caplog, target, told):
    swap(bench, target=target)
    assert [told in record.message for record in caplog.records] == [True] * (told is not None)
    assert "or take Attune Prompt Refine" in caplog.text or not told
    caplog.clear()
    outputs(AttunePromptRefine, bench.model, bench.clip, bench.trajectory, SOURCE, target, 0.0, 0.8, 0.0, 0.4, 1024)
    assert not caplog.records


def test_a_word_that_is_not_there(bench):
    with pytest.raises(ValueError) as error:
        outputs(AttuneAttentionMaps, bench.model, bench.clip, bench.trajectory, SOURCE, "red, zebra", 256, 5)
    one_sentence(error, '"zebra" is not in the prompt', "; change words or the prompt on Attune Attention Maps.")


def test_an_empty_batch_and_a_wrong_latent(bench):
    with pytest.raises(ValueError) as error:
        invert(bench, {"samples": torch.zeros(0, 4, 16, 16)})
    one_sentence(error, "no picture")
    with pytest.raises(ValueError) as error:
        invert(bench, {"samples": torch.zeros(1, 16, 16, 16)})
    one_sentence(error, "needs .pictures, 4,")
    with pytest.raises(ValueError) as error:
        outputs(AttuneContactSheet, torch.zeros(0, 8, 8, 3), "", 64)
    one_sentence(error, "image_1 of Attune Contact Sheet is a tensor .* at least one picture")


def test_choices_that_are_none(bench):
    with pytest.raises(ValueError) as error:
        invert(bench, {"samples": torch.zeros(1, 4, 16, 16)}, grid="zzz")
    one_sentence(error, "zzz", "host .ends at t = 1.")


def dit():
    """A real transformer model of the host, as small as it goes."""
    config = comfy.supported_models.AuraFlow({})
    sizes = {"cond_seq_dim": 64, "dim": 256, "n_heads": 1, "n_layers": 2, "n_double_layers": 1, "max_seq": 64}
    config.unet_config = {**sizes, "dtype": torch.float32}
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def test_a_transformer_model_is_refused(bench):
    model = dit()
    for attempt in (
        lambda: swap(bench, model=model),
        lambda: invert(bench, {"samples": torch.zeros(1, 4, 16, 16)}, model=model),
        lambda: outputs(AttuneAttentionMaps, model, bench.clip, bench.trajectory, SOURCE, "", 256, 5),
    ):
        with pytest.raises(ValueError) as error:
            attempt()
        one_sentence(error, "The MODEL is a MMDiT", "Stable Diffusion UNets")


def test_an_empty_prompt_for_maps(bench):
    with pytest.raises(ValueError) as error:
        outputs(AttuneAttentionMaps, bench.model, bench.clip, bench.trajectory, "  ", "", 256, 5)
    one_sentence(error, "prompt is empty")
