"""A ComfyUI extension for the tests alone: a small random checkpoint under the name of the Stable Diffusion 1.5 file.

It teaches the stock loader one more width of SD 1.x and writes the file into the server's own base folder, so that a
shipped workflow runs there without a change and without a download. Never attach it to a ComfyUI that is in use.
"""

from pathlib import Path

import comfy.ops
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.supported_models_base import ClipTarget
from comfy.taesd.taesd import TAESD
from safetensors.torch import save_file

NAME = "v1-5-pruned-emaonly-fp16.safetensors"
WIDTH, TEXT_WIDTH = 32, 32  # the host's group norms have 32 groups, so nothing narrower works
CLIP = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": TEXT_WIDTH,
}
NODE_CLASS_MAPPINGS = {}


class SmallClip(SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device, dtype, {**(model_options or {}), "clip_l_model_config": CLIP})


class StandIn(comfy.supported_models.SD15):
    """What the loader compares a file with. SD 1.5 has eight heads; one is what makes 64x64 tokens quick on a CPU."""

    unet_config = {**comfy.supported_models.SD15.unet_config, "context_dim": TEXT_WIDTH, "model_channels": WIDTH}
    unet_extra_config = {"num_heads": 1, "num_head_channels": -1}

    def clip_target(self, state_dict=None):
        return ClipTarget(SD1Tokenizer, SmallClip)


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


def write(path):
    random = torch.Generator().manual_seed(0)
    unet = filled(build_unet(), "model.diffusion_model.", random)
    # A random network is no denoiser; a faint one leaves the picture alone, and null-text has little to learn.
    unet["model.diffusion_model.out.2.weight"] *= 0.001
    text = {k.replace("clip_l", "cond_stage_model", 1): v for k, v in filled(SmallClip(), "", random).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**unet, **text, **filled(TAESD(), "first_stage_model.", random)}, path)


comfy.supported_models.models.insert(0, StandIn)
write(Path(folder_paths.get_folder_paths("checkpoints")[0]) / NAME)
