"""SD 2.x and SDXL, small and with random weights: UNet, text encoders and noise schedule of each family's own kind.

No picture comes of them. They are there to show that the pack does on these architectures what it does on SD 1.x, in
tests and beside diffusers (:mod:`families_parity`).
"""

import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.sd2_clip import SD2ClipModel, SD2Tokenizer
from torch import nn

from ..demo.model import _initialise

HEAD = 32  # the width of an attention head
WIDTHS = {"SDXL": {"l": 16, "g": 32}, "SD2": {"h": 48}}  # of the text encoders, by their names
SIZES = 6 * 256  # what SDXL is told of a picture's size: six lengths
COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_heads": -1,
    "num_head_channels": HEAD,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "context_dim": 48,
}
SDXL = COMMON | {  # its blocks, with 1 and 2 layers where it has 2 and 10
    "num_res_blocks": [2, 2, 2],
    "channel_mult": (1, 2, 2),
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "adm_in_channels": WIDTHS["SDXL"]["g"] + SIZES,
    "num_classes": "sequential",
}
SD2 = COMMON | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 1, 2, 2),
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "adm_in_channels": None,
}
FAMILIES = {
    "SDXL": (comfy.supported_models.SDXL, SDXL, ClipTarget(SDXLTokenizer, SDXLClipModel)),
    "SD2": (comfy.supported_models.SD20, SD2, ClipTarget(SD2Tokenizer, SD2ClipModel)),
}
LAYERS = {"SDXL": 2 * 1 + 2 * 2 + 2 + 3 * 2 + 3 * 1, "SD2": 6 + 1 + 9}


def model(name, **changes):
    """The MODEL of a family, fp32 on the CPU; ``changes`` go into its UNet's configuration. SD 2.x predicts v."""
    kind, settings, _ = FAMILIES[name]
    config = kind({})
    config.unet_config = settings | changes
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    # By this tensor's spread the host tells the checkpoints of SD 2.x that predict v.
    told = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}
    base = config.get_model(told, device=torch.device("cpu"))
    base.diffusion_model.apply(_initialise)
    # A random network is no denoiser; a small last layer keeps its runs tame, and queries and keys that are large
    # make its attention choose, as a trained one's does.
    nn.init.normal_(base.diffusion_model.out[2].weight, std=0.05)
    for name, parameter in base.diffusion_model.named_parameters():
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.data *= 3
    return ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def clip(name):
    """The CLIP of a family, with all of its text encoders, fp32 on the CPU."""
    sizes = {f"clip_{encoder}_model_config": _text_config(width) for encoder, width in WIDTHS[name].items()}
    options = {"load_device": torch.device("cpu"), "dtype": torch.float32, **sizes}
    folders = folder_paths.get_folder_paths("embeddings")
    made = comfy.sd.CLIP(FAMILIES[name][2], embedding_directory=folders, model_options=options)
    torch.manual_seed(1)
    made.cond_stage_model.apply(_initialise)
    for module in made.cond_stage_model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    return made


def _text_config(width):
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,  # the last but one is read
        "projection_dim": width,
    }
