"""Masks: what an edit's goal makes of one, and one that is found while the picture is being drawn."""

from comfy_api.latest import io, ui

from ..attention_patches.mask_strategy import GOALS, strategy
from ..attention_patches.refinement import SPREAD, STANDARDISATIONS, Refinement
from ..attention_patches.words import read_list
from ..inversion import host as runs
from . import schema, sheet
from .edit import check_painted, share


class AttuneMaskStrategy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneMaskStrategy",
            display_name="Attune Mask Strategy",
            category="Attune/mask",
            description=(
                "Makes the source mask, the target mask and the choice to keep the object that Attune Context "
                "Preserving takes, from one mask and what you want to do."
            ),
            inputs=[
                io.Mask.Input(
                    "mask",
                    tooltip='White on the object; for "edit inside" and "add", where the prompt is to be drawn.',
                ),
                io.Combo.Input(
                    "goal",
                    options=list(GOALS),
                    default="replace object",
                    tooltip="\n".join(f"{name}: {tooltip}" for name, (_, tooltip) in GOALS.items()),
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=0,
                    max=512,
                    tooltip=(
                        "By how many pixels the object's mask is loosened for replace, change pose and remove. A tight "
                        "mask leaves the old outline or a rim of the object; a loose one gives the new form room."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output("source_mask", display_name="source_mask", tooltip="Where the source's object lies."),
                io.Mask.Output("target_mask", display_name="target_mask", tooltip="Where the prompt is drawn."),
                io.Boolean.Output(
                    "keep_object", display_name="keep_object", tooltip="Whether the object is drawn from the source."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return schema.searchable(node, "cpam", "mask guidance", "remove object", "change background", "grow mask")

    @classmethod
    def execute(cls, mask, goal, grow):
        schema.check_choice(goal, GOALS, "The goal", "Attune Mask Strategy")
        check_painted(mask.any(), "mask", "Attune Mask Strategy", f'what "{goal}" is about')
        runs.say(schema.node_id(cls), GOALS[goal][1])
        return io.NodeOutput(*strategy(mask.float(), goal, grow))


class AttuneMaskRefinement(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneMaskRefinement",
            display_name="Attune Mask Refinement",
            category="Attune/mask",
            description=(
                "Lets the target mask of Attune Context Preserving follow the object while the picture is drawn: after "
                "some steps it is found anew in each, from where the object's words look (CPAM, mask refinement). "
                "Attune Refined Mask shows it."
            ),
            inputs=[
                io.String.Input(
                    "words",
                    default="circle",
                    tooltip="Words of the target prompt that name the object, with commas between.",
                ),
                share(
                    "after",
                    0.2,
                    "Share of the steps during which the given target mask is used. Lower lets the new form decide "
                    "sooner; too low, and the words do not know their place yet. 1 switches the refinement off.",
                ),
                io.Combo.Input(
                    "standardisation",
                    options=list(STANDARDISATIONS),
                    default=SPREAD,
                    tooltip=(
                        "What the threshold counts in: standard deviations from the map's mean, or its way from least "
                        "to greatest (0 to 1). The paper says only that it is simple."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "From where on a place is the object's. Higher makes the mask smaller; lower it where parts of "
                        "the object are cut off. 1 suits standard deviations, 0.1 to 0.4 least to greatest."
                    ),
                ),
                io.Int.Input(
                    "grow",
                    default=1,
                    min=0,
                    max=16,
                    tooltip=(
                        "By how many tokens of that level the mask is loosened, so that the form is not cut to what it "
                        "is by now: 1 is one 16x16 token, 32 pixels of 512."
                    ),
                ),
                io.Int.Input(
                    "tokens",
                    default=256,
                    min=1,
                    max=1 << 20,
                    tooltip="Which level says where the words look: the one whose picture tokens come nearest.",
                ),
            ],
            outputs=[
                schema.Refinement.Output(
                    "refinement", display_name="refinement", tooltip="Connect it to Attune Context Preserving."
                )
            ],
        )
        schema.folded(node, "standardisation", "tokens")
        return schema.searchable(node, "cpam", "attention mask", "dynamic mask", "mask from words")

    @classmethod
    def execute(cls, words, after, standardisation, threshold, grow, tokens):
        schema.check_choice(standardisation, STANDARDISATIONS, "The standardisation", "Attune Mask Refinement")
        found = tuple(read_list(words))
        if not found:
            raise ValueError(
                "No words say where the object is; fill in words on Attune Mask Refinement with words of the target "
                "prompt."
            )
        return io.NodeOutput(Refinement(found, after, standardisation, threshold, grow, tokens))


class AttuneRefinedMask(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneRefinedMask",
            display_name="Attune Refined Mask",
            category="Attune/mask",
            description=(
                "Shows the target masks that Attune Mask Refinement found in a sampling: the last one as a mask, and "
                "all of them in a strip. Put it behind the sampler."
            ),
            inputs=[
                schema.Refinement.Input("refinement", tooltip="The Attune Mask Refinement of the edit."),
                io.Latent.Input("latent", tooltip="The edit, as it comes out of the sampler."),
                io.Int.Input(
                    "height", default=96, min=16, max=1024, tooltip="Height of each mask in the strip, in pixels."
                ),
            ],
            outputs=[
                io.Mask.Output("mask", display_name="mask", tooltip="The last target mask, in the picture's size."),
                io.Image.Output("strip", display_name="strip", tooltip="The masks step by step."),
            ],
        )
        return schema.searchable(node, "cpam", "mask refinement", "mask strip")

    @classmethod
    def execute(cls, refinement, latent, height):
        samples = latent["samples"]
        found = refinement.log.masks(samples)
        if found is None:
            raise ValueError(
                "The LATENT did not come from a sampling in which this refinement found a mask; connect the sampler "
                "that draws the edit to Attune Refined Mask, and give Attune Mask Refinement an after below 1."
            )
        strip = sheet.mask_strip(found.masks, found.steps, found.total, height, runs.each)
        return io.NodeOutput(runs.to_pixels(found.last(samples.shape[-2:])), strip, ui=ui.PreviewImage(strip, cls=cls))


NODES = [AttuneMaskStrategy, AttuneMaskRefinement, AttuneRefinedMask]
