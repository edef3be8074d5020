"""The demo world: a model and pictures to try every node on, without a download."""

import numpy as np
import torch
from comfy_api.latest import io

from ..attention_patches.sketch import sketch_of
from ..demo import scenes
from ..demo.model import load_demo, offer_adapter
from . import schema

BEFORE = "a red circle and a striped blue square on a gray background"
offer_adapter()


class AttuneDemoCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneDemoCheckpoint",
            display_name="Attune Demo Checkpoint",
            category="Attune/demo",
            description=(
                "A tiny Stable Diffusion that comes with the pack and draws coloured shapes at 128x128. It takes the "
                "place of Load Checkpoint wherever you want to try something in seconds."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="model",
                    tooltip="An SD1-shaped UNet; works with every stock sampler.",
                ),
                io.Clip.Output(
                    "clip",
                    display_name="clip",
                    tooltip='Its text encoder; it knows captions such as "a red circle on a gray background".',
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="Its autoencoder, 8 pixels a latent as usual."),
            ],
        )
        return schema.searchable(node, "tiny model", "test checkpoint", "toy model", "example model")

    @classmethod
    def execute(cls):
        return io.NodeOutput(*load_demo())


class AttuneDemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneDemoScene",
            display_name="Attune Demo Scene",
            category="Attune/demo",
            description="Draws a scene of the demo world from its caption, with the exact mask of every object.",
            inputs=[
                io.String.Input(
                    "caption",
                    default=BEFORE,
                    tooltip=(
                        "One or two objects: an optional pattern (striped, dotted), a colour, a shape "
                        f"({', '.join(scenes.SHAPES)}), and the background's colour."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=True,
                    tooltip="Where things sit, how big they are, and their exact hues and light.",
                ),
                io.Int.Input("size", default=128, min=64, max=1024, step=64, tooltip="Side of the picture in pixels."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The picture."),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip="One mask per object in the caption's order, white on the object.",
                ),
                io.String.Output("prompt", display_name="caption", tooltip="The caption, for the text encoder."),
            ],
        )
        return schema.searchable(node, "synthetic image", "test picture", "shapes")

    @classmethod
    def execute(cls, caption, seed, size):
        scene = scenes.scene_from_caption(caption, np.random.default_rng(seed))
        picture, masks = scenes.render(scene, size)
        return io.NodeOutput(torch.from_numpy(picture)[None], torch.from_numpy(masks), caption)


class AttuneDemoEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneDemoEdit",
            display_name="Attune Demo Edit",
            category="Attune/demo",
            description=(
                "The same scene as Attune Demo Scene draws, perfectly edited: what an edit should show, where it "
                "changes the picture, and its sketch."
            ),
            inputs=[
                io.String.Input("caption", default=BEFORE, tooltip="The caption of Attune Demo Scene."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="The seed of Attune Demo Scene.",
                ),
                io.Int.Input("size", default=128, min=64, max=1024, step=64, tooltip="Side of the picture in pixels."),
                io.String.Input(
                    "edited_caption",
                    default="a red star and a striped blue square on a gray background",
                    tooltip=(
                        "The caption after the edit. Objects change in the caption's order; a further one is added "
                        "where there is room, and one that is left out is removed."
                    ),
                ),
                io.Int.Input(
                    "grow",
                    default=6,
                    min=0,
                    max=256,
                    tooltip="How far the mask reaches around what changes, in pixels.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The perfect edit."),
                io.Mask.Output(
                    "mask", display_name="mask", tooltip="White on every object that changes, as it was and is."
                ),
                io.Image.Output(
                    "sketch", display_name="sketch", tooltip="The edited picture's outlines, for a sketch adapter."
                ),
                io.String.Output("prompt", display_name="caption", tooltip="The edited caption, for the text encoder."),
            ],
        )
        return schema.searchable(node, "ground truth", "synthetic edit", "sketch")

    @classmethod
    def execute(cls, caption, seed, size, edited_caption, grow):
        scene = scenes.scene_from_caption(caption, np.random.default_rng(seed))
        edited = scenes.edit_by_caption(scene, edited_caption)
        picture, masks = scenes.render(edited, size)
        mask = torch.from_numpy(scenes.changed(scene, edited, size))[None]
        mask = torch.nn.functional.max_pool2d(mask, 2 * grow + 1, 1, grow)
        lines = sketch_of(torch.from_numpy(masks))
        return io.NodeOutput(torch.from_numpy(picture)[None], mask, lines, edited_caption)


NODES = [AttuneDemoCheckpoint, AttuneDemoScene, AttuneDemoEdit]
