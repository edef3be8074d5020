"""Builds the demo model out of the host's own classes, and loads its weights into MODEL, CLIP and VAE.

The host recognises checkpoints by SD's real widths, so a small one needs its own loader; it touches no list of the
host's. Weights are read from one safetensors file beside this one.
"""

import functools
from pathlib import Path

import comfy.model_management as management
import comfy.ops
import comfy.sd
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer
from comfy.supported_models_base import ClipTarget
from comfy.t2i_adapter.adapter import Adapter
from safetensors import SafetensorError, safe_open
from torch import nn

from .autoencoder import Autoencoder
from .text import HEADS, LAYERS, TEXT_WIDTH

WEIGHTS = Path(__file__).parent / "weights" / "attune_demo.safetensors"
ADAPTER = Path(__file__).parent / "controlnet" / "attune_demo_sketch_adapter.safetensors"

# SD1.5's layout (16 transformer blocks, three attention levels and a middle) at a fraction of its width. Heads are 32
# wide, as many as fit: eight narrow ones would train at two thirds of the speed on a CPU.
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 1, 2, 2),
    "num_heads": -1,
    "num_head_channels": 32,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": TEXT_WIDTH,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
}
ADAPTER_CHANNELS = [UNET["model_channels"] * multiple for multiple in (1, 2, 4, 4)]  # of a stock T2I-Adapter
VOCABULARY = 49408  # of CLIP's tokenizer
CLIP = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "projection_dim": TEXT_WIDTH,
}
# The smallest of the host's own autoencoders; its network is replaced by ours at once.
TINY_KL = {
    "embed_dim": 4,
    "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    },
}  # fmt: skip


# ---- for training ------------------------------------------------------------------------------------------------


def _initialise(module):
    """The host's layers leave their memory as they find it; training needs the usual start."""
    for kind in (nn.Conv2d, nn.Linear):
        if isinstance(module, kind):
            kind.reset_parameters(module)
    if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def build_unet():
    """The UNet, fp32, freshly initialised; the last layer of every residual branch starts at nothing."""
    unet = UNetModel(**UNET, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    unet.apply(_initialise)
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def _fold(unet, args, kwargs):
    """Adds up the channels of an adapter's features in pairs where they are twice as many as the level has."""
    control = kwargs.get("control")
    if not control or not control["input"]:  # a ControlNet leads the other half of the UNet
        return None
    widths, width = [], UNET["model_channels"]
    for multiple in UNET["channel_mult"]:  # three input blocks a level, each adding what stands last in the list
        widths += 3 * [multiple * width]
    features = zip(control["input"], reversed(widths), strict=True)
    folded = [
        f.unflatten(1, (width, 2)).sum(2) if f is not None and f.shape[1] == 2 * width else f for f, width in features
    ]
    return args, {**kwargs, "control": {**control, "input": folded}}


def take_adapters(unet):
    """Lets the UNet take a stock T2I-Adapter, whose widths double where SD's do: the demo model's double later."""
    unet.adapter_channels = ADAPTER_CHANNELS
    unet.register_forward_pre_hook(_fold, with_kwargs=True)


def build_adapter():
    """The host's own T2I-Adapter for hints of one channel, at the demo model's width, that adds nothing yet."""
    net = Adapter(channels=ADAPTER_CHANNELS, nums_rb=2, cin=64, ksize=1, sk=True, use_conv=False, xl=False)
    for name, parameter in net.named_parameters():
        if name.startswith("conv_in") or "block2" in name or name.endswith("in_conv.bias"):
            nn.init.zeros_(parameter)
    return net


@functools.cache
def token_ids(words):
    """The CLIP token id of each word, all of which must be single tokens."""
    tokenizer = SD1Tokenizer()
    ids = {}
    for word in words:
        tokens = [t for t, _ in tokenizer.tokenize_with_weights(word)["l"][0]]
        if tokens[2] != 49407:
            raise ValueError(f"{word!r} is more than one CLIP token; the demo world only uses single-token words.")
        ids[word] = tokens[1]
    return ids


# ---- for use -----------------------------------------------------------------------------------------------------


def offer_adapter():
    """Lists the demo's sketch adapter in the host's Load ControlNet Model."""
    folder_paths.add_model_folder_path("controlnet", str(ADAPTER.parent))


def _unreadable(path, problem):
    return ValueError(
        f"The demo weights {path.name} cannot be read ({problem}); install the Attune pack again to get the file that "
        "Attune Demo Checkpoint needs."
    )


def read_weights(path=WEIGHTS):
    """The file's tensors in three dictionaries: "unet", "text", "autoencoder", with prefixes taken off.

    Raises ValueError when the file is missing or damaged.
    """
    parts = {"unet": {}, "text": {}, "autoencoder": {}}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                part, name = key.split(".", 1)
                parts[part][name] = file.get_tensor(key)
        parts["text"]["token_ids"], parts["unet"]["out.2.weight"], parts["autoencoder"]["mean"]
    except (OSError, SafetensorError, KeyError, ValueError) as problem:
        raise _unreadable(path, str(problem).splitlines()[0]) from problem
    return parts


def load_model(weights):
    """The UNet as a stock MODEL, in the precision that the host chooses for a model of its size."""
    device, supported = management.get_torch_device(), comfy.supported_models.SD15.supported_inference_dtypes
    parameters = sum(t.numel() for t in weights.values())
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=torch.float16)
    config = comfy.supported_models.SD15({})
    config.unet_config = dict(UNET)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    offload = management.unet_offload_device()
    model = config.get_model({}, device=offload)
    model.diffusion_model.load_state_dict(weights)
    take_adapters(model.diffusion_model)
    return ModelPatcher(model, load_device=device, offload_device=offload)


def load_clip(weights):
    """The text encoder as a stock CLIP. A word that it never learned reads the row of the unknown word."""
    weights = dict(weights)
    known, compact = weights.pop("token_ids"), weights.pop("token_embedding.weight")
    clip = comfy.sd.CLIP(
        ClipTarget(SD1Tokenizer, SD1ClipModel),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"clip_l_model_config": CLIP},
    )
    table = compact[known.tolist().index(-1)].repeat(VOCABULARY, 1)
    table[known[known >= 0].long()] = compact[known >= 0]
    state = {"text_model.embeddings.token_embedding.weight": table, "text_projection.weight": torch.eye(TEXT_WIDTH)}
    for name, tensor in weights.items():
        where = "embeddings." if name.startswith("position") else "encoder." if name.startswith("layers") else ""
        state[f"text_model.{where}{name}"] = tensor
    missing, unexpected = clip.load_sd(state)
    if missing or unexpected:
        raise KeyError(*missing, *unexpected)
    return clip


def load_vae(weights):
    """The autoencoder as a stock VAE."""
    vae = comfy.sd.VAE(sd=AutoencoderKL(**_copy(TINY_KL)).state_dict(), config={"params": _copy(TINY_KL)})
    net = Autoencoder().eval()
    net.load_state_dict(weights)
    vae.first_stage_model = net.to(vae.vae_dtype)
    vae.patcher = ModelPatcher(net, load_device=vae.device, offload_device=management.vae_offload_device())
    vae.size = management.module_size(net)  # newer hosts measured the network that ours replaces
    return vae


def _copy(params):
    return {**params, "ddconfig": dict(params["ddconfig"])}


def load_demo(path=WEIGHTS):
    """MODEL, CLIP and VAE of the demo model. Raises ValueError when the file is missing or damaged."""
    weights = read_weights(path)
    try:
        return load_model(weights["unet"]), load_clip(weights["text"]), load_vae(weights["autoencoder"])
    except (RuntimeError, ValueError, KeyError) as problem:
        raise _unreadable(path, "its tensors are not this version's") from problem
