"""The demo model's UNet in diffusers' layout, for comparisons that share no code with the host."""

from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

HEAD_WIDTH = 32  # no tensor's shape tells it
PREFIX = "model.diffusion_model."  # what diffusers' converter finds a UNet by inside a checkpoint


def _config(weights):
    # Three input blocks a level, the first of which widens; the convolution that ends it tells the level's width.
    widths = tuple(len(weights[f"input_blocks.{3 * level + 1}.0.out_layers.3.bias"]) for level in range(4))
    return {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        # Diffusers reads this as the NUMBER of heads, whatever its name says.
        "attention_head_dim": tuple(width // HEAD_WIDTH for width in widths),
        "cross_attention_dim": weights["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "use_linear_projection": False,
    }


def unet(weights, config=None):
    """A diffusers UNet2DConditionModel (fp32, eval, no gradients) with the weights of an SD-style UNet.

    ``weights`` maps LDM's tensor names without a prefix ("input_blocks.0.0.weight") to tensors, as
    ``demo.model.read_weights()["unet"]`` does; any floating dtype. ``config`` is the model's; without one it is SD1's,
    with widths that are read off the tensors and attention heads 32 wide. The model takes latents (B, 4, h, w),
    timesteps 0..999 and text (B, 77, width).

    Raises ValueError unless every tensor finds its place and every place its tensor.
    """
    try:
        config = config or _config(weights)
        converted = convert_ldm_unet_checkpoint({PREFIX + name: t.float() for name, t in weights.items()}, config)
        # The converter passes over names that it does not know.
        if len(converted) != len(weights):
            raise RuntimeError(f"{len(weights) - len(converted)} tensors have no place")
        model = UNet2DConditionModel(**config)
        model.load_state_dict(converted)
    except (KeyError, RuntimeError) as problem:
        reason = " ".join(str(problem).split()).rstrip(".")
        raise ValueError(f"The tensors are not those of an SD UNet with two layers a level ({reason}).") from problem
    return model.eval().requires_grad_(False)
