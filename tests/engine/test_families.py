"""The UNets of SD 2.x and SDXL, small and random: other layers, other conditioning, the same promises."""

from dataclasses import replace

import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import pytest
import torch

from attune.attention_patches import host as patches
from attune.attention_patches.context_preserving import ContextPreserving
from attune.attention_patches.controller import NULL
from attune.attention_patches.free_prompt_editing import FreePromptEditing
from attune.attention_patches.masks import Mask
from attune.attention_patches.mutual_self_attention import MutualSelfAttention
from attune.attention_patches.prompt_to_prompt import PromptToPrompt
from attune.attention_patches.reference import Reference
from attune.attention_patches.values import Window
from attune.demo.model import _initialise
from attune.inversion import host as runs
from attune.inversion import null_text
from attune.inversion.trajectory import Trajectory
from attune.nodes.fusion import NOISES, AttuneIntermediate, AttuneMaskedFusion, AttuneSourceFusion

from .bench import adapter, outputs

CPU = torch.device("cpu")
COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "context_dim": 48,
    "use_linear_in_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
SDXL = COMMON | {
    "num_res_blocks": [1, 1, 1],
    "channel_mult": (1, 2, 2),
    "transformer_depth": [0, 2, 3],
    "transformer_depth_middle": 3,
    "transformer_depth_output": [0, 0, 2, 2, 3, 3],
    "adm_in_channels": 2816,
    "num_classes": "sequential",
}
SD2 = COMMON | {
    "num_res_blocks": [1, 1, 1, 1],
    "channel_mult": (1, 1, 2, 2),
    "transformer_depth": [1, 1, 1, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 0, 0],
    "adm_in_channels": None,
}
FAMILIES = {
    "SDXL": (comfy.supported_models.SDXL, SDXL, 2 + 3 + 3 + 2 * 2 + 2 * 3),
    "SD2": (comfy.supported_models.SD20, SD2, 3 + 1 + 6),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    kind, settings, layers = FAMILIES[request.param]
    config = kind({})
    config.unet_config = dict(settings)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    model = config.get_model({"some": torch.zeros(1)}, device=CPU)
    model.diffusion_model.apply(_initialise)
    # A random network is no denoiser; a small last layer keeps its runs tame.
    torch.nn.init.normal_(model.diffusion_model.out[2].weight, std=0.01)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU), layers


def conditioning(seed, prompt):
    torch.manual_seed(seed)
    return [[torch.randn(1, 77, 48), {"pooled_output": torch.randn(1, 1280), patches.PROMPT: prompt}]]


def sample(model, positive, sigmas, start, guidance, path=None, negative=None):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, conditioning(9, "") if negative is None else negative)
    guider.set_cfg(guidance)

    def keep(step, x0, x, total):
        if path is not None:
            path.append(x.clone())

    sampler = comfy.samplers.sampler_object("euler")
    end = guider.sample(torch.zeros_like(start), start, sampler, sigmas, callback=keep, disable_pbar=True, seed=0)
    if path is not None:
        path.append(runs.to_model_scale(model, end))
    return end


def edits():
    """Name -> the controller of each method, for a prompt, and whether it is on."""
    every, left = torch.ones(77, dtype=torch.bool), torch.zeros(1, 8, 6)
    left[:, :, :3] = 1

    def swap(on, **of):
        window = Window(0, float(on))
        return PromptToPrompt(mapper=torch.eye(77), injected=every, cross=window, self_=window, reference=NULL, **of)

    def free(on, **of):
        return FreePromptEditing(reference=NULL, window=Window(0, float(on)), **of)

    def mutual(on, **of):
        mask = Mask(left)
        window = Window(0, float(on))
        return MutualSelfAttention(reference=NULL, window=window, source_mask=mask, target_mask=mask, layer=2, **of)

    def context(on, **of):
        mask = Mask(left if on else torch.ones_like(left))
        return ContextPreserving(source_mask=mask, target_mask=mask, object_keys=mask, **of)

    return {"word swap": swap, "free prompt editing": free, "mutual": mutual, "context preserving": context}


@pytest.mark.parametrize("method", edits().values(), ids=edits())
def test_edits(family, method):
    """Off, it is the plain run; on, something else; reading the very run that is drawn, that run again."""
    model, layers = family
    with torch.inference_mode():
        assert len(patches._grids(model.model.diffusion_model, 16, 12)) == layers
        sigmas = runs.schedule(model, 5, runs.HOST_GRID)
        start = runs.to_host_scale(model, torch.randn(1, 4, 16, 12) * float(sigmas[0]))
        source, target, path = conditioning(1, "source"), conditioning(2, "target"), []
        alone = sample(model, source, sigmas, start, 1.0, path)
        reference = Reference(NULL, sigmas, torch.stack(path), source, 5)

        def edited(prompt, on=True):
            return patches.install(model, [reference], [method(on, prompt=prompt, tokens=77)])

        plain = sample(model, target, sigmas, start, 3.0)
        assert torch.equal(sample(edited("target", on=False), target, sigmas, start, 3.0), plain)
        steered = sample(edited("target"), target, sigmas, start, 3.0)
        assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-3 * plain.std()
        if method.__name__ in ("swap", "free"):  # a mask keeps some of the keys from being read
            same = sample(edited("source"), source, sigmas, start, 1.0)
            assert (same - alone).abs().max() < 1e-3 * alone.std()


def test_null_text(family):
    """Each picture's own pooled text and size go along where only some of a batch are still learning."""
    model, _ = family
    sigmas, settings = torch.tensor([4.0, 2.0, 1.0]), null_text.NullText(3.0, inner=3, tolerance=0.0)
    torch.manual_seed(3)
    latents = torch.randn(3, 2, 4, 16, 12)
    negative = [[torch.randn(2, 77, 48), {"pooled_output": torch.randn(2, 1280)}]]

    def learned(rows):
        text, extras = negative[0]
        own = [[text[rows], {"pooled_output": extras["pooled_output"][rows]}]]

        def body(network, start, report):
            path, null = latents[:, rows].clone(), own[0][0].clone()
            first = null_text.begin(path)
            *_, last = null_text.learn(settings, network.denoise, sigmas, path, null, first, lambda *_: 0)
            return torch.stack(last.nulls), last.losses

        return runs.learn(model, conditioning(1, "x"), own, latents[-1, rows], 1, body)

    with torch.inference_mode():
        both, losses = learned([0, 1])
        assert both.isfinite().all() and all(mine[-1] < mine[0] for step in losses for mine in step)
        for i in range(2):
            assert (learned([i])[0][:, 0] - both[:, i]).abs().max() < 5e-3


def test_inversion(family):
    model, _ = family
    with torch.inference_mode():
        sigmas = runs.schedule(model, 5, runs.PAPERS_GRID)
        seen = []
        patches.check_plain(model)
        recorder = patches.recording(model, lambda place, own, heads: seen.append(place.layer))
        runs.walk(recorder, conditioning(1, "x"), torch.randn(1, 4, 16, 12), sigmas, lambda d, x, report: d(x, 1.0))
        assert len(set(seen)) == len(seen) == 2 * family[1]


class Decoded:
    """In the place of a VAE, which none of these families has at this size."""

    def decode(self, samples):
        return samples.movedim(1, -1)


FUSED = 0.0, 1.0, 2  # start, end, layer


@pytest.fixture(scope="module")
def drawn(family):
    """A trajectory that a family drew without guidance, and texts for an edit of it."""
    model, _ = family
    with torch.inference_mode():
        sigmas, source, path = runs.schedule(model, 4, runs.HOST_GRID), conditioning(1, "source"), []
        start = runs.to_host_scale(model, torch.randn(1, 4, 16, 12) * float(sigmas[0]))
        sample(model, source, sigmas, start, 1.0, path)
        trajectory = Trajectory(sigmas, torch.stack(path), 4, runs.describe_model(model), source)
        return trajectory, conditioning(2, "target"), conditioning(9, "")


def fused(made):
    model, positive, negative, latent, sigmas = made
    return sample(model, positive, sigmas, latent["samples"], 3.0, negative=negative)


@pytest.mark.parametrize("masked", [False, True], ids=["whole picture", "mask"])
def test_source_fusion(family, drawn, masked):
    """It steers; and with the source's text for target and negative it is the source again."""
    model, _ = family
    trajectory, target, empty = drawn
    mask = torch.zeros(1, 128, 96)
    mask[:, 40:, 30:] = 1
    with torch.inference_mode():
        settings = {"mask": mask if masked else None, "layer": 2}
        on, off = (
            outputs(AttuneSourceFusion, model, trajectory, target, empty, start=0.0, end=end, **settings)
            for end in (1.0, 0.0)
        )
        steered, plain = fused(on), fused(off)
        assert (steered - plain).abs().max() > 1e-3 * plain.std()
        assert torch.equal(plain, fused((model, *off[1:])))
        text = trajectory.conditioning
        same = outputs(AttuneSourceFusion, model, trajectory, text, text, start=0.0, end=1.0, **settings)
        source = runs.host_latent(trajectory, -1)
        assert (fused(same) - source).abs().max() < 1e-3 * source.std()


def test_masked_fusion(family, drawn):
    """Each family's other conditionings, such as SDXL's pooled text, go along with every row."""
    model, _ = family
    trajectory, target, empty = drawn
    mask = torch.zeros(1, 128, 96)
    mask[:, 40:, 30:] = 1
    with torch.inference_mode():
        other = replace(trajectory, latents=trajectory.latents.flip(-1), conditioning=target, negative=empty)
        made = outputs(AttuneMaskedFusion, model, trajectory, other, mask, *FUSED)
        steered, plain = fused(made), fused((model, *made[1:]))
        assert (steered - plain).abs().max() > 1e-3 * plain.std()


def test_an_adapter_of_another_family_is_refused(family, drawn):
    """By its widths, and by its layout where they are right."""
    model, _ = family
    trajectory, target, empty = drawn
    three = len(model.model.diffusion_model.channel_mult) == 3

    def intermediate(control):
        return outputs(
            AttuneIntermediate, model, trajectory, target, empty, control, torch.zeros(1, 128, 96, 3),
            torch.ones(1, 16, 12), Decoded(), 0, 3.0, 1.0, 0.0, 1.0, "both", NOISES[0], *FUSED,
        )  # fmt: skip

    for channels, xl in (((320, 640, 1280, 1280), False), ((320, 640, 1280, 1280), True)):
        with pytest.raises(ValueError, match=r"The CONTROL_NET is a T2I-Adapter of widths \[320.* Attune Intermediate"):
            intermediate(adapter(channels=channels, xl=xl))
    with pytest.raises(ValueError, match="T2I-Adapter"):  # the right widths in the other family's layout
        intermediate(adapter(channels=(32, 64, 64, 64) if three else (32, 32, 64, 64), xl=not three))
