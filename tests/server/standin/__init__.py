"""A ComfyUI extension for the tests alone: small random files, and a node that stands for another pack.

Two checkpoints have the names of the files of Stable Diffusion 1.5 and SDXL, and the stock loader is taught their
widths, so that a shipped workflow runs without a change and without a download. A LoRA and a ControlNet fit the demo
model. All are written into the server's own base folder. Never attach it to a ComfyUI that is in use.
"""

from pathlib import Path

import comfy.ops
import comfy.supported_models
import folder_paths
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy.supported_models_base import ClipTarget
from comfy.t2i_adapter import adapter as t2i
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

NAME, XL_NAME = "v1-5-pruned-emaonly-fp16.safetensors", "sd_xl_base_1.0.safetensors"
WIDTH, TEXT_WIDTH = 32, 32  # the host's group norms have 32 groups, so nothing narrower works
CLIP = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": TEXT_WIDTH,
}


class SmallClip(SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, {**(model_options or {}), "clip_l_model_config": CLIP})


class SmallXLClip(SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        deep = CLIP | {"num_hidden_layers": 3}  # the last but one is read
        sizes = {"clip_l_model_config": deep, "clip_g_model_config": deep}
        super().__init__(device, dtype, {**(model_options or {}), **sizes})


class StandIn(comfy.supported_models.SD15):
    """What the loader compares a file with. SD 1.5 has eight heads; one is what makes 64x64 tokens quick on a CPU."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": TEXT_WIDTH, "model_channels": WIDTH}
    unet_extra_config = {"num_heads": 1, "num_head_channels": -1}

    def clip_target(self, state_dict=None):
        return ClipTarget(SD1Tokenizer, SmallClip)


class StandInXL(comfy.supported_models.SDXL):
    """The same for SDXL, whose finer attention, at 64x64 tokens of 1024 pixels, is left out."""

    unet_config = {
        **comfy.supported_models.SDXL.unet_config, "context_dim": 2 * TEXT_WIDTH, "model_channels": WIDTH,
        "adm_in_channels": TEXT_WIDTH + 6 * 256, "transformer_depth": [0, 0, 0, 0, 2, 2],
    }  # fmt: skip
    unet_extra_config = {"num_heads": -1, "num_head_channels": WIDTH}

    def clip_target(self, state_dict=None):
        return ClipTarget(SDXLTokenizer, SmallXLClip)


def build_xl_unet():
    return UNetModel(
        **StandInXL.unet_config, **StandInXL.unet_extra_config, image_size=32, in_channels=4, out_channels=4,
        num_res_blocks=[2, 2, 2], channel_mult=(1, 2, 4), use_spatial_transformer=True, legacy=False,
        transformer_depth_output=[0] * 6 + [2] * 3, transformer_depth_middle=2, num_classes="sequential",
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def build_unet():
    """SD 1.5's blocks, without attention at 64x64 tokens, where it would take more than half of the time."""
    return UNetModel(
        **StandIn.unet_config, **StandIn.unet_extra_config, image_size=32, in_channels=4, out_channels=4,
        num_res_blocks=[2, 2, 2, 2], channel_mult=(1, 1, 2, 2), use_spatial_transformer=True, legacy=False,
        transformer_depth=[0, 0, 1, 1, 1, 1, 0, 0], transformer_depth_output=[0] * 3 + [1] * 6 + [0] * 3,
        transformer_depth_middle=1, dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def filled(module, prefix, random):
    """The module's tensors with values that keep signals in bounds; the host leaves memory as it finds it."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        if tensor.ndim > 1:
            tensor = torch.randn(tensor.shape, generator=random) / tensor[0].numel() ** 0.5
        elif tensor.ndim == 1:
            tensor = torch.full(tensor.shape, float(name.endswith("weight")))
        tensors[prefix + name] = tensor.detach().half()
    return tensors


def save(folder, name, tensors):
    path = Path(folder_paths.get_folder_paths(folder)[0]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def checkpoint(random):
    text = {k.replace("clip_l", "cond_stage_model", 1): v for k, v in filled(SmallClip(), "", random).items()}
    return with_unet(build_unet(), text, random)


def xl_checkpoint(random):
    text = StandInXL({}).process_clip_state_dict_for_saving(filled(SmallXLClip(), "", random))
    return with_unet(build_xl_unet(), text, random)


def with_unet(unet, text, random):
    unet = filled(unet, "model.diffusion_model.", random)
    # A random network is no denoiser; a faint one leaves the picture alone, and null-text has little to learn.
    unet["model.diffusion_model.out.2.weight"] *= 0.001
    return {**unet, **text, **filled(TAESD(), "first_stage_model.", random)}


# -- beside the demo model ---------------------------------------------------------------------------------------------


def lora(random):
    """Rank 4, on what some of the demo model's layers put out, by the names that trainers write."""
    tensors = {}
    for place, width in (("input_blocks_4_1", 64), ("middle_block_1", 128), ("output_blocks_9_1", 64)):
        for layer in ("attn1_to_v", "attn2_to_out_0"):
            name = f"lora_unet_{place}_transformer_blocks_0_{layer}"
            tensors[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=random) / width**0.5
            tensors[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=random) / 2
            tensors[f"{name}.alpha"] = torch.tensor(4.0)
    return tensors


def control_net(random):
    """Of the demo model's widths; the stock loader finds them out by itself."""
    net = ControlNet(
        image_size=32, in_channels=4, model_channels=64, hint_channels=3, num_res_blocks=[2, 2, 2, 2],
        channel_mult=(1, 1, 2, 2), num_head_channels=64, use_spatial_transformer=True, context_dim=128, legacy=False,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0], transformer_depth_middle=1, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    return filled(net, "", random)


def t2i_adapter():
    """SD 1.5's T2I-Adapter for sketches, in its own file layout, name and widths; a zero of each tensor is on disk."""
    with torch.device("meta"):
        net = t2i.Adapter([320, 640, 1280, 1280], nums_rb=2, cin=64, ksize=1, sk=True, use_conv=False, xl=False)
    return {name: torch.zeros(1, dtype=torch.float16).expand(t.shape) for name, t in net.state_dict().items()}


class Adapter:
    """What IP-Adapter packs put into an attention slot: it adds to the attention and takes further callbacks."""

    def __init__(self, weight):
        self.weights = [weight]

    def add(self, _, weight):
        self.weights.append(weight)

    def __call__(self, q, k, v, options):
        out = attention.optimized_attention(q, k, v, options["n_heads"])
        return out + sum(self.weights) * torch.roll(out, 1, dims=-1)


class StandInAdapter:
    """Puts them there as those packs do: ``.add`` where the slot is taken, an object of its own where it is free."""

    INPUT_TYPES = classmethod(lambda _: {"required": {"model": ("MODEL",), "weight": ("FLOAT", {"default": 0.3})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    def apply(self, model, weight):
        model = model.clone()
        options = model.model_options["transformer_options"] = model.model_options["transformer_options"].copy()
        table = options["patches_replace"] = dict(options.get("patches_replace", {}))
        entries = table["attn2"] = dict(table.get("attn2", {}))
        for key in [("input", 1), ("input", 4), ("middle", 0), ("output", 5), ("output", 10)]:
            if key in entries:
                entries[key].add(None, weight)
            else:
                entries[key] = Adapter(weight)
        return (model,)


# ComfyUI-Manager reads ids out of every repository, tests included; it does not see this form.
NODE_CLASS_MAPPINGS = dict(StandInAdapter=StandInAdapter)

comfy.supported_models.models[:0] = StandIn, StandInXL
save("checkpoints", NAME, checkpoint(torch.Generator().manual_seed(0)))
save("checkpoints", XL_NAME, xl_checkpoint(torch.Generator().manual_seed(0)))
save("loras", "demo.safetensors", lora(torch.Generator().manual_seed(0)))
save("controlnet", "demo.safetensors", control_net(torch.Generator().manual_seed(0)))
torch.save(t2i_adapter(), Path(folder_paths.get_folder_paths("controlnet")[0]) / "t2iadapter_sketch_sd15v2.pth")
