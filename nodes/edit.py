"""Edits: a MODEL that draws the target while reading the source."""

import logging

from comfy_api.latest import io

from ..attention_patches import host
from ..attention_patches.prompt_swap import PromptSwap
from ..attention_patches.reference import Reference
from ..attention_patches.values import Window
from ..attention_patches.words import swap_map
from ..inversion import host as runs
from ..inversion.trajectory import check_same_model
from . import schema

log = logging.getLogger("attune")


def share(name, default, tooltip):
    """A place in the sampling, as a share of its steps."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.05, round=0.001, tooltip=tooltip)


def warn_of_another_caption(trajectory, prompt, node_id):
    """Tells the user where a trajectory was made under another caption than the edit's source prompt."""
    made_under = trajectory.header.get("prompt")
    if made_under and made_under.strip() != prompt.strip():
        warning = f'The TRAJECTORY was made under "{made_under}", but the source prompt is "{prompt}".'
        log.warning(warning)
        runs.say(node_id, warning)


class AttunePromptSwap(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttunePromptSwap",
            display_name="Attune Prompt Swap",
            category="Attune/edit",
            description=(
                "Exchanges words of a picture's caption, one for one, and keeps the picture's layout: the new word is "
                "drawn where the old one was (Prompt-to-Prompt, word swap)."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder; it reads both prompts."),
                schema.Trajectory.Input("trajectory", tooltip="The source picture, from an Attune inversion."),
                io.String.Input(
                    "source_prompt",
                    multiline=True,
                    default="a red circle on a gray background",
                    tooltip="The picture's caption as it is. It should name what you want to exchange.",
                ),
                io.String.Input(
                    "target_prompt",
                    multiline=True,
                    default="a blue circle on a gray background",
                    tooltip="The same caption with words exchanged, as many words as before.",
                ),
                share(
                    "cross_start",
                    0.0,
                    "Share of the trajectory's steps after which words look where the source's words looked. Start and "
                    "end equal switch this part off.",
                ),
                share(
                    "cross_end",
                    0.8,
                    "Share of the steps until which they do. Higher keeps the old layout more strictly; lower lets the "
                    "new word change the shape of things.",
                ),
                share(
                    "self_start", 0.0, "Share of the steps after which the picture is put together as the source is."
                ),
                share(
                    "self_end",
                    0.4,
                    "Share of the steps until which it is. Higher keeps outlines and background; lower gives the edit "
                    "room. Lower this first when an edit does not show.",
                ),
                io.Int.Input(
                    "token_limit",
                    default=1024,
                    min=0,
                    max=1 << 20,
                    tooltip=(
                        "The structure is kept only in layers with at most this many picture tokens: 256 is 16x16, "
                        "1024 is 32x32 (the papers' code uses either). Lower leaves finer detail to the edit."
                    ),
                ),
            ],
            outputs=[
                # An output may not share its id with an input.
                io.Model.Output(
                    "edited",
                    display_name="model",
                    tooltip="Draws the edit. The model that came in is not changed.",
                ),
                io.Conditioning.Output(
                    "positive",
                    display_name="positive",
                    tooltip="The target prompt: connect it to the sampler's positive.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return schema.searchable(node, "prompt-to-prompt", "p2p", "word swap", "replace word", "attention replace")

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, target_prompt,
        cross_start, cross_end, self_start, self_end, token_limit,
    ):  # fmt: skip
        host.check_unet(model)
        check_same_model(trajectory, runs.describe_model(model))
        warn_of_another_caption(trajectory, source_prompt, schema.node_id(cls))
        source, target = host.read_words(clip, source_prompt), host.read_words(clip, target_prompt)
        controller = PromptSwap(
            prompt=target_prompt,
            tokens=target.length,
            mapper=swap_map(source, target),
            cross=Window(cross_start, cross_end, "cross_start to cross_end"),
            self_=Window(self_start, self_end, "self_start to self_end"),
            token_limit=token_limit,
        )
        conditioning = host.encode(clip, source_prompt)
        reference = Reference("source", trajectory.sigmas, trajectory.latents, conditioning, trajectory.steps)
        return io.NodeOutput(host.install(model, [reference], [controller]), host.encode(clip, target_prompt))


NODES = [AttunePromptSwap]
