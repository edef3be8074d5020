"""The demo model, a source picture and its trajectory, and how each method is put on a MODEL; quick to sample."""

import contextlib
import copy
import functools
from dataclasses import replace

import comfy.controlnet
import comfy.samplers
import comfy.t2i_adapter.adapter
import comfy_extras.nodes_custom_sampler as custom
import torch
from comfy.ldm.modules import attention

import nodes as stock
from attune.attention_patches import host as patches
from attune.attention_patches.masked_fusion import INSIDE, OUTSIDE
from attune.attention_patches.proximal import SOFT
from attune.inversion import host as runs
from attune.inversion.trajectory import Trajectory
from attune.nodes.demo import AttuneDemoCheckpoint
from attune.nodes.edit import AttuneLocalBlend, AttunePromptRefine, AttunePromptReweight, AttunePromptSwap
from attune.nodes.fusion import AttuneMaskedFusion
from attune.nodes.guidance import AttuneProximalGuidance
from attune.nodes.self_attention import (
    AttuneContextPreserving,
    AttuneFreePromptEditing,
    AttuneMutualSelfAttention,
    AttuneRegionPrompts,
)

SOURCE = "a red circle and a blue square on a gray background"
TARGET = "a yellow circle and a blue square on a gray background"
STEPS = 5


def outputs(node, *args, **kwargs):
    """A node's outputs, whether it is written in the host's older or newer style."""
    if hasattr(node, "execute"):
        given = node.execute(*args, **kwargs)
        return getattr(given, "result", given)
    return getattr(node(), node.FUNCTION)(*args, **kwargs)


def adapter(seed=0, channels=(64, 128, 256, 256), xl=False):
    """A random T2I-Adapter, by itself as wide as the demo model's: the host's class, as its loader makes it."""
    torch.manual_seed(seed)
    net = comfy.t2i_adapter.adapter.Adapter(
        channels=list(channels), nums_rb=1, cin=256 if xl else 64, ksize=1, sk=True, use_conv=False, xl=xl
    )
    return comfy.controlnet.T2IAdapter(net, 1, 8, "nearest-exact", device=torch.device("cpu"))


@contextlib.contextmanager
def overflowing(model):
    """In it, what the UNet predicts is beyond what a loss in fp32 can hold."""
    handle = model.model.diffusion_model.register_forward_hook(lambda _, given, predicted: predicted * 1e30)
    try:
        yield
    finally:
        handle.remove()


class Bench:
    """Every call runs the host's own classes; pictures are latents in the model's scale."""

    def __init__(self, height=16, width=16, batch=1, guidance=5.0, steps=STEPS):
        self.settings = {"height": height, "width": width, "batch": batch, "guidance": guidance, "steps": steps}
        self.model, self.clip, self.vae = self.load()
        self.guidance = guidance
        self.steps, self.sigmas = steps, runs.schedule(self.model, steps, runs.HOST_GRID)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(batch, 4, height, width, generator=generator) * float(self.sigmas[0])
        self.noise = {"samples": runs.to_host_scale(self.model, start)}
        self.trajectory = self.record(SOURCE, self.guidance)

    def load(self):
        return outputs(AttuneDemoCheckpoint)

    def like(self, **changes):
        """A new one with other settings."""
        return Bench(**self.settings | changes)

    def but(self, **changes):
        """A copy with other attributes."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def text(self, prompt):
        return outputs(stock.CLIPTextEncode, self.clip, prompt)[0]

    def away(self, positive, negative=None):
        """A negative, the empty text by itself, in the parts of the picture that ``positive`` has, where it has any."""
        negative, name = self.text("") if negative is None else negative, patches.PROMPT
        parts = [extras for _, extras in positive if extras.get(name) in (OUTSIDE, INSIDE)]
        cut = (patches.part_of_picture(negative, e[name], e["mask"], e.get("control")) for e in parts)
        return [one for part in cut for one in part] or negative

    @functools.cached_property
    def other(self):
        """The trajectory of another picture from the same noise."""
        return self.record("a green star on a white background", self.guidance)

    def record(self, prompt, guidance):
        """The trajectory of drawing a picture with the stock sampler, every latent as the sampler had it."""
        path = []
        guider = comfy.samplers.CFGGuider(self.model)
        guider.set_conds(self.text(prompt), self.text(""))
        guider.set_cfg(guidance)
        sampler = comfy.samplers.sampler_object("euler")
        start = self.noise["samples"]
        end = guider.sample(
            torch.zeros_like(start), start, sampler, self.sigmas, disable_pbar=True, seed=0,
            callback=lambda step, x0, x, total: path.append(x.clone()),
        )  # fmt: skip
        path.append(runs.to_model_scale(self.model, end))
        return Trajectory(self.sigmas, torch.stack(path).cpu(), self.steps, runs.describe_model(self.model))

    def sample(self, model, positive, latent=None, sampler="euler", guidance=None, negative=None, sigmas=None, seed=0):
        """The latent that a stock SamplerCustom draws from the trajectory's noise."""
        euler = outputs(custom.KSamplerSelect, sampler)[0]
        guidance = self.guidance if guidance is None else guidance
        sigmas = self.sigmas if sigmas is None else sigmas
        negative = self.away(positive) if negative is None else negative
        latent = self.noise if latent is None else latent
        return outputs(custom.SamplerCustom, model, False, seed, guidance, positive, negative, euler, sigmas, latent)[
            0
        ]["samples"]


def prompt_swap(bench, strength, model=None, trajectory=None, source=SOURCE, target=TARGET):
    """``strength`` 1 is the method as it is meant; 0 must be no edit at all."""
    return outputs(
        AttunePromptSwap, model or bench.model, bench.clip, trajectory or bench.trajectory, source, target,
        0.0, 0.8 * strength, 0.0, 0.4 * strength, 1024,
    )  # fmt: skip


REFINED = "a striped red circle and a blue square on a gray background"


def prompt_refine(bench, strength, model=None, trajectory=None, source=SOURCE, target=REFINED):
    return outputs(
        AttunePromptRefine, model or bench.model, bench.clip, trajectory or bench.trajectory, source, target,
        0.0, 0.8 * strength, 0.0, 0.4 * strength, 1024,
    )  # fmt: skip


def prompt_reweight(bench, strength, model=None, prompt=SOURCE, weights="red: -2, gray: 3"):
    return outputs(
        AttunePromptReweight, model or bench.model, bench.clip, bench.trajectory, prompt, weights,
        0.0, 0.8 * strength, 0.0, 0.4 * strength, 1024,
    )  # fmt: skip


def local_blend(bench, strength, model=None, mask=None, inside="", outside="", target=TARGET, start=0.2, threshold=0.3):
    return outputs(
        AttuneLocalBlend, model or bench.model, bench.clip, bench.trajectory, SOURCE, target, inside, outside,
        threshold, start if strength else 1.0, 256, mask,
    )  # fmt: skip


def swap_and_blend(bench, strength, model=None):
    """With a mask, since what words have gathered so far a run that starts half-way cannot know."""
    edited, _ = prompt_swap(bench, strength, model)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 20:] = 1
    return local_blend(bench, strength, edited, mask)


def everything(bench, strength, model=None):
    """Refinement, re-weighting and a blend by words, stacked."""
    edited, _ = prompt_refine(bench, strength, model)
    edited, _ = prompt_reweight(bench, strength, edited, REFINED, "striped: 1.5, blue: -1")
    return local_blend(bench, strength, edited, inside="circle", outside="square", target=REFINED, start=0.4)


def half(side=64):
    """A mask whose right two thirds are white."""
    mask = torch.zeros(1, side, side)
    mask[:, :, side // 3 :] = 1
    return mask


def free_prompt_editing(bench, strength, model=None, source=SOURCE, target=TARGET, layers=""):
    return outputs(
        AttuneFreePromptEditing, model or bench.model, bench.clip, bench.trajectory, source, target,
        0.0, 0.8 * strength, 1024, layers,
    )  # fmt: skip


def mutual(bench, strength, model=None, source="", target=TARGET, start=0.2, layer=8, words=("", ""), **masks):
    return outputs(
        AttuneMutualSelfAttention, model or bench.model, bench.clip, bench.trajectory, source, target,
        start * strength, 1.0 * strength, layer, *words, 0.1, **masks,
    )  # fmt: skip


def mutual_found(bench, strength, model=None):
    """With masks from words, which have to be known in the negative rows too."""
    return mutual(bench, strength, model, SOURCE, words=("circle, square", "circle, square"))


def context_preserving(bench, strength, model=None, source_mask=None, target_mask=None, target=TARGET, **settings):
    """At strength 0 the mask is full and nothing is kept: plain sampling."""
    settings = {
        "keep_object": False, "plain_share": 0.1, "seed": 0, "plain_draw": "every step and layer",
        "object_start": 0.08, "object_layer": 9, "source_keys": "source mask",
    } | settings  # fmt: skip
    mask = (half() if source_mask is None else source_mask) if strength else torch.ones(1, 8, 8)
    target_mask = target_mask if strength else None
    return outputs(
        AttuneContextPreserving, model or bench.model, bench.clip, bench.trajectory, target, mask,
        target_mask=target_mask, **settings,
    )  # fmt: skip


def object_kept(bench, strength, model=None):
    return context_preserving(bench, strength, model, keep_object=bool(strength))


def region_prompts(bench, strength, model=None):
    return outputs(
        AttuneRegionPrompts, model or bench.model, bench.clip, TARGET, "a green star", "a white ring",
        mask_1=half() * strength, mask_2=half().flip(-1) * strength,
    )  # fmt: skip


def masked_fusion(bench, strength, model=None):
    """With another picture for the intermediate; the contract starts from the source's noise alone."""
    intermediate = replace(bench.other, conditioning=bench.text(TARGET), negative=bench.text(""))
    return outputs(
        AttuneMaskedFusion, model or bench.model, bench.trajectory, intermediate, half(), 0.0, 0.8 * strength, 4,
        bench.text(SOURCE),
    )[:2]  # fmt: skip


def proximal_guidance(bench, strength, model=None):
    """It knows no source, so what it does shows on plain sampling."""
    return outputs(AttuneProximalGuidance, model or bench.model, 0.5 * strength, SOFT)[0], bench.text(TARGET)


# Every method that edits a MODEL joins here, and with that every contract test.
METHODS = {
    "prompt swap": prompt_swap,
    "prompt reweight": prompt_reweight,
    "swap and local blend": swap_and_blend,
    "refine, reweight and local blend": everything,
    "free prompt editing": free_prompt_editing,
    "mutual self-attention": mutual_found,
    "context preserving": object_kept,
    "region prompts": region_prompts,
    "masked fusion": masked_fusion,
    "proximal guidance": proximal_guidance,
}
QUICK = {masked_fusion: {"height": 8, "steps": 3}}  # settings for those that take eight rows a step


class PlainAdapter:
    """What IP-Adapter packs put into an attention slot: it adds to the attention and takes further callbacks."""

    def __init__(self, callback, **kwargs):
        self.callbacks, self.kwargs = [callback], [kwargs]

    def add(self, callback, **kwargs):
        self.callbacks.append(callback)
        self.kwargs.append(kwargs)

    def __call__(self, q, k, v, options):
        out = attention.optimized_attention(q, k, v, options["n_heads"])
        return out + sum(c(out, q, k, v, options, **k_) for c, k_ in zip(self.callbacks, self.kwargs, strict=True))


def apply_ip_adapter(model, strength):
    """As those packs do it: take what sits in the slot and call ``.add`` on it, else put an object there."""

    def callback(out, q, k, v, options, weight):
        return weight * torch.roll(out, 1, dims=-1)

    model = model.clone()
    options = model.model_options["transformer_options"] = model.model_options["transformer_options"].copy()
    table = options["patches_replace"] = dict(options.get("patches_replace", {}))
    entries = table["attn2"] = dict(table.get("attn2", {}))
    for key in [("input", 1), ("input", 4), ("middle", 0), ("output", 5), ("output", 10)]:
        if key in entries:
            entries[key].add(callback, weight=strength)
        else:
            entries[key] = PlainAdapter(callback, weight=strength)
    return model
