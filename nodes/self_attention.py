"""Edits by self-attention and by region: a MODEL that draws the target from what the source is made of."""

import functools

import torch
from comfy_api.latest import io

from ..attention_patches import host
from ..attention_patches.context_preserving import ContextPreserving
from ..attention_patches.controller import NULL
from ..attention_patches.free_prompt_editing import FreePromptEditing
from ..attention_patches.masks import HALF, Mask
from ..attention_patches.mutual_self_attention import MutualSelfAttention
from ..attention_patches.reference import Reference
from ..attention_patches.region_prompts import RegionPrompts
from ..attention_patches.values import Window
from ..attention_patches.watch import Watch, WatchedWords
from ..attention_patches.words import read_layers, read_list, read_numbers
from . import schema
from .edit import (
    check_model,
    check_painted,
    edit_outputs,
    share,
    source_inputs,
    source_of,
    text_of,
    warn,
    warn_of_another_clip,
    warn_of_early_layer,
    warn_of_no_layer,
)

TARGET = "a blue circle on a gray background"
EVERY, ONCE = "every step and layer", "once for all steps"
BY_SOURCE, BY_TARGET = "source mask", "target mask"
SOURCE, JOINT = "source", "source and itself"


# ---- what they share ---------------------------------------------------------------------------------------------


def source_text(tooltip):
    return io.String.Input("source_prompt", multiline=True, default="", tooltip=tooltip)


def target_text(tooltip):
    return io.String.Input("target_prompt", multiline=True, default=TARGET, tooltip=tooltip)


def null_source(model, clip, trajectory, node_id):
    """The trajectory as a reference that is read under the empty prompt."""
    host.check_unet(model)
    check_model(model, trajectory, node_id)
    null = read_without_text(clip, trajectory, node_id)
    warn_of_another_clip(clip, trajectory, node_id, null.conditioning)
    return null


def read_without_text(clip, trajectory, node_id):
    text = host.encode(clip, "", trajectory.conditioning)
    tell = functools.partial(warn, node_id)
    return Reference(NULL, trajectory.sigmas, trajectory.latents, text, trajectory.steps, tell)


def sources_of(model, clip, trajectory, prompt, node_id):
    """The references for a source prompt that may be empty, the one for the positive rows first."""
    if not prompt.strip():
        return [null_source(model, clip, trajectory, node_id)]
    return [source_of(model, clip, trajectory, prompt, node_id), read_without_text(clip, trajectory, node_id)]


# ---- nodes -------------------------------------------------------------------------------------------------------


class AttuneFreePromptEditing(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneFreePromptEditing",
            display_name="Attune Free Prompt Editing",
            category="Attune/edit",
            description=(
                "Draws a new prompt in the layout of the source picture: outlines stay, colours and materials follow "
                "the prompt (Free-Prompt-Editing). The picture needs no caption: invert it with an empty one."
            ),
            inputs=[
                *source_inputs(),
                source_text(
                    "What the trajectory was made under: leave it empty for a picture that was inverted with an empty "
                    "prompt, or give the caption of a generated or null-text inverted one."
                ),
                target_text("What the picture shall show. It need not resemble the source's caption."),
                share("start", 0.0, "Share of the trajectory's steps after which the layout is taken over."),
                share(
                    "end",
                    0.8,
                    "Share of the steps until which it is. Higher keeps outlines and background; lower it to let the "
                    "prompt reshape things. Start and end equal switch the edit off.",
                ),
                io.Int.Input(
                    "token_limit",
                    default=1024,
                    min=0,
                    max=1 << 20,
                    tooltip=(
                        "The layout is taken over in layers of at most this many picture tokens: 1024 is 32x32, as in "
                        "the authors' code for pictures of 512 pixels. Lower leaves finer outlines to the prompt."
                    ),
                ),
                io.String.Input(
                    "layers",
                    default="",
                    tooltip=(
                        'The layers themselves, counted from 1, in place of the token limit: "4-14" is the paper\'s '
                        "choice among the 16 of Stable Diffusion 1.x. Empty goes by the token limit."
                    ),
                ),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "layers")
        return schema.searchable(node, "fpe", "free prompt editing", "self-attention replace", "layout", "structure")

    @classmethod
    def execute(cls, model, clip, trajectory, source_prompt, target_prompt, start, end, token_limit, layers=""):
        reference = sources_of(model, clip, trajectory, source_prompt, schema.node_id(cls))[0]
        controller = FreePromptEditing(
            prompt=target_prompt,
            tokens=None,
            reference=reference.name,
            window=Window(start, end, "start to end"),
            token_limit=token_limit,
            layers=read_layers(layers, "layers on Attune Free Prompt Editing"),
        )
        host.check_layers(model, controller.layers, "layers", "Attune Free Prompt Editing", first=1)
        if controller.layers is None and start < end:
            warn_of_no_layer(model, trajectory, token_limit, schema.node_id(cls))
        return io.NodeOutput(host.install(model, [reference], [controller]), text_of(clip, trajectory, target_prompt))


class AttuneMutualSelfAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneMutualSelfAttention",
            display_name="Attune Mutual Self-Attention",
            category="Attune/edit",
            description=(
                "Draws the prompt with the source's colours and textures: pose, place and shape may change, and the "
                "thing stays the same thing (MasaCtrl). Masks, or words that find them, keep object and background "
                "apart."
            ),
            inputs=[
                *source_inputs(),
                source_text(
                    "What the trajectory was made under. Empty suits a picture that was inverted with an empty prompt "
                    "and saves one UNet row a step."
                ),
                target_text("What the picture shall show: the same thing, doing something else."),
                share(
                    "start",
                    0.08,
                    "Share of the steps after which the source is read: 0.08 of 50 steps is the paper's step 4. Higher "
                    "lets the prompt change more of the layout.",
                ),
                share("end", 1.0, "Share of the steps until which it is. Start and end equal switch the edit off."),
                io.Int.Input(
                    "layer",
                    default=10,
                    min=0,
                    max=1000,
                    tooltip=(
                        "The first self-attention layer that reads the source, counted from 0; Stable Diffusion 1.x "
                        "has 16. 10 is the paper's; 6 keeps more of the source, SDXL has 70 layers and wants a later "
                        "one."
                    ),
                ),
                io.String.Input(
                    "source_words",
                    default="",
                    tooltip=(
                        "Words of the source prompt that name the object, with commas between: they find it in the "
                        "source, in place of a mask."
                    ),
                ),
                io.String.Input(
                    "target_words",
                    default="",
                    tooltip="Words of the target prompt that name the object: they find it in the new picture.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "How strongly a place must belong to the words, between the least and the greatest. Higher "
                        "makes the found object smaller."
                    ),
                ),
                io.Mask.Input("source_mask", optional=True, tooltip="White where the object lies in the source."),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="White where the object goes in the new picture; without it, where it lay.",
                ),
                io.String.Input(
                    "layers",
                    default="",
                    optional=True,
                    tooltip=(
                        'The layers themselves, counted from 0, in place of layer: "10-15" is the paper\'s in Stable '
                        'Diffusion 1.x, "8, 10-12" any other. Fewer layers take less from the source. Empty goes '
                        "by layer."
                    ),
                ),
                io.String.Input(
                    "steps",
                    default="",
                    optional=True,
                    tooltip=(
                        'The steps themselves, counted from 0, in place of start and end: "4-49" is the paper\'s of '
                        "50. Fewer steps, and later ones, leave more to the prompt. Empty goes by start and end."
                    ),
                ),
                io.Combo.Input(
                    "reads",
                    options=[SOURCE, JOINT],
                    default=SOURCE,
                    optional=True,
                    tooltip=(
                        'What the new picture reads. "source" is the paper\'s; "source and itself" reads its own '
                        "features beside the source's, so that less is taken and more follows the prompt."
                    ),
                ),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "source_words", "target_words", "threshold", "layers", "steps", "reads")
        return schema.searchable(node, "masactrl", "consistent", "pose", "non-rigid", "mutual attention", "same object")

    @classmethod
    def execute(
        cls, model, clip, trajectory, source_prompt, target_prompt, start, end, layer, source_words="",
        target_words="", threshold=0.1, source_mask=None, target_mask=None, layers="", steps="", reads=SOURCE,
    ):  # fmt: skip
        chosen = read_numbers(layers, "layers on Attune Mutual Self-Attention")
        times = read_numbers(steps, "steps on Attune Mutual Self-Attention")
        if times and min(times) >= trajectory.steps:
            raise ValueError(
                f'The steps of Attune Mutual Self-Attention are "{steps}", but the trajectory has {trajectory.steps}, '
                f"0 to {trajectory.steps - 1}; change steps there."
            )
        references = sources_of(model, clip, trajectory, source_prompt, schema.node_id(cls))
        source, target = host.read_words(clip, source_prompt), host.read_words(clip, target_prompt)
        lies, goes = read_list(source_words), read_list(target_words)
        if lies and not source_prompt.strip():
            raise ValueError(
                f'The source words "{source_words}" find the object by the source prompt, which is empty; fill in '
                "source_prompt on Attune Mutual Self-Attention, or connect a source_mask to it."
            )
        if (goes or target_mask is not None) and not lies and source_mask is None:
            raise ValueError(
                "target_mask and target_words need a source_mask or source_words too, to find the object in the "
                "source; connect a source_mask to Attune Mutual Self-Attention, or fill in its source_words."
            )
        if lies and not goes and target_mask is None:
            raise ValueError(
                f'source_words "{source_words}" need target_words or a target_mask too, to find the object in the '
                "edit; fill in target_words on Attune Mutual Self-Attention, or connect a target_mask to it."
            )
        painted = source_mask is None or (source_mask >= HALF).any()
        if target_mask is None:
            check_painted(painted, "source_mask", "Attune Mutual Self-Attention", "where the object lies")
        elif not painted:
            warn(
                schema.node_id(cls),
                "source_mask is black, so the object of the target_mask reads nothing of the source; paint white where "
                "it lies (right-click Load Image > Open in MaskEditor).",
            )
        source_mask = None if source_mask is None else Mask(source_mask)
        if target_mask is not None and not target_mask.any():
            warn(
                schema.node_id(cls),
                "target_mask is black, so the object is drawn nowhere; paint white where it goes (right-click Load "
                "Image > Open in MaskEditor).",
            )
        # Words find what no mask says; a source mask alone is where the object stays.
        target_mask = Mask(target_mask) if target_mask is not None else None if goes else source_mask
        lies, goes = (() if source_mask else lies), (() if target_mask else goes)
        node = "on Attune Mutual Self-Attention"
        words = WatchedWords(
            source.positions(lies, f"source_words or the source prompt {node}"),
            target.positions(goes, f"target_words or the target prompt {node}"),
        )
        name = references[0].name
        controller = MutualSelfAttention(
            prompt=target_prompt,
            tokens=target.length if lies or goes else None,
            reference=name,
            window=Window(start, end, "start to end"),
            layer=layer,
            source_mask=source_mask,
            target_mask=target_mask,
            finder=Watch(words, reference=name, at_once=True) if lies or goes else None,
            threshold=threshold,
            layers=chosen,
            steps=times,
            joint=reads == JOINT,
        )
        said = "layer" if chosen is None else "layers"
        host.check_layers(model, chosen or [layer], said, "Attune Mutual Self-Attention")
        warn_of_early_layer(model, min(chosen or [layer]), said, schema.node_id(cls))
        text = text_of(clip, trajectory, target_prompt)
        if lies or goes:
            host.check_length(target, text)
        return io.NodeOutput(host.install(model, references, [controller]), text)


class AttuneContextPreserving(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneContextPreserving",
            display_name="Attune Context Preserving",
            category="Attune/edit",
            description=(
                "Draws the prompt inside a mask and keeps what is around it by reading it from the source: replaces, "
                "removes or adds an object, changes its pose, or changes the background (CPAM). Attune Mask Strategy "
                "makes its masks for each of these goals. The picture needs no caption: invert it with an empty one."
            ),
            inputs=[
                *source_inputs(),
                target_text("What shall be inside the target mask. Everything else reads no prompt at all."),
                io.Mask.Input(
                    "source_mask",
                    tooltip="White where the source's object lies; what is black is the background that is kept.",
                ),
                io.Boolean.Input(
                    "keep_object",
                    default=False,
                    tooltip=(
                        "On, the inside is drawn from the source's object: for a new pose or view of the same thing. "
                        "Off, it is drawn from the prompt alone."
                    ),
                ),
                io.Float.Input(
                    "plain_share",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "Share of the layers that is left alone, so that object and background grow together. 0.1 is "
                        "the paper's; 0 keeps the background most strictly, 1 leaves only the prompt's mask."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Which layers those are. Another seed gives a slightly different picture.",
                ),
                io.Combo.Input(
                    "plain_draw",
                    options=[EVERY, ONCE],
                    default=EVERY,
                    tooltip=(
                        "Whether those layers are drawn anew in every step or once. The paper does not say; anew "
                        "spreads their effect evenly."
                    ),
                ),
                share(
                    "object_start",
                    0.08,
                    "With keep_object: share of the steps after which the object is read. 0.08 of 50 steps is step 4, "
                    "the first after the paper's 3. Higher lets the pose change more.",
                ),
                io.Int.Input(
                    "object_layer",
                    default=9,
                    min=0,
                    max=1000,
                    tooltip=(
                        "With keep_object: the first self-attention layer that reads it, counted from 0; 9 is the "
                        "first after the paper's 8. Lower keeps more of the object's form."
                    ),
                ),
                io.Combo.Input(
                    "source_keys",
                    options=[BY_SOURCE, BY_TARGET],
                    default=BY_SOURCE,
                    tooltip=(
                        "With keep_object: which mask says where the object is in the source. The paper's formula has "
                        "the target mask, which is right only where the object stays; the source mask always is."
                    ),
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip=(
                        "White where the new picture is drawn from the prompt; make it loose. Without it, the source "
                        "mask. All black removes the object."
                    ),
                ),
                schema.Refinement.Input(
                    "refinement",
                    optional=True,
                    tooltip="From Attune Mask Refinement: the target mask then follows the object while it is drawn.",
                ),
                io.Boolean.Input(
                    "preservation",
                    default=True,
                    optional=True,
                    tooltip=(
                        "The paper's preservation adaptation: what lies outside the mask reads the source's "
                        "background. Off, only the prompt is held to the mask, and the rest of the picture changes "
                        "with it."
                    ),
                ),
                io.Boolean.Input(
                    "extraction",
                    default=True,
                    optional=True,
                    tooltip=(
                        "The paper's localized extraction: only the inside reads the prompt. Off, all of the picture "
                        "reads it, so the background takes on some of what it says."
                    ),
                ),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(
            node, "seed", "plain_draw", "object_start", "object_layer", "source_keys", "preservation", "extraction"
        )
        return schema.searchable(
            node, "cpam", "keep background", "remove object", "replace object", "add object", "inpaint", "pose"
        )

    @classmethod
    def execute(
        cls, model, clip, trajectory, target_prompt, source_mask, keep_object, plain_share, seed, plain_draw,
        object_start, object_layer, source_keys, target_mask=None, refinement=None, preservation=True, extraction=True,
    ):  # fmt: skip
        host.check_layers(model, [object_layer], "object_layer", "Attune Context Preserving")
        if keep_object:
            warn_of_early_layer(model, object_layer, "object_layer", schema.node_id(cls))
        # Beside a target mask of its own it may be black: then an object is added where none lies.
        if target_mask is None:
            check_painted(
                source_mask.any(), "source_mask", "Attune Context Preserving", "where the picture may change"
            )
        elif keep_object and source_keys == BY_SOURCE:
            check_painted(
                (source_mask >= HALF).any(), "source_mask", "Attune Context Preserving", "on the object that is kept"
            )
        read = host.read_words(clip, target_prompt)
        source = Mask(source_mask)
        target = source if target_mask is None else Mask(target_mask)
        controller = ContextPreserving(
            prompt=target_prompt,
            tokens=None if refinement is None else read.length,
            source_mask=source,
            target_mask=target,
            object_keys=source if source_keys == BY_SOURCE else target,
            keep_object=keep_object,
            keeping=Window(object_start, 1.0, "object_start"),
            object_layer=object_layer,
            plain_share=plain_share,
            plain_every_step=plain_draw == EVERY,
            seed=seed,
            refinement=refinement and refinement.for_prompt(read),
            preservation=preservation,
            extraction=extraction,
        )
        reference = null_source(model, clip, trajectory, schema.node_id(cls))
        text = text_of(clip, trajectory, target_prompt)
        if refinement is not None:
            host.check_length(read, text)
        return io.NodeOutput(host.install(model, [reference], [controller]), text)


REGIONS = range(1, 5)


class AttuneRegionPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneRegionPrompts",
            display_name="Attune Region Prompts",
            category="Attune/edit",
            description=(
                "A prompt for each region of the picture and one for the rest. The regions are drawn together, so "
                "light and style run through (CPAM, multi-text synthesis). It needs no source picture."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any Stable Diffusion model; Attune edits may be on it."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder; it reads the prompts."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red circle and a blue square on a gray background",
                    tooltip="What is read wherever no region is: the whole scene, or its background.",
                ),
                *(
                    io.String.Input(
                        f"prompt_{i}",
                        multiline=True,
                        default="",
                        tooltip=f"What mask_{i}'s region shows. Empty leaves the region out.",
                    )
                    for i in REGIONS
                ),
                *(
                    io.Mask.Input(
                        f"mask_{i}",
                        optional=True,
                        tooltip=(
                            f"White where prompt_{i} is read. Soft edges fade into the rest; where regions overlap "
                            "they share."
                        ),
                    )
                    for i in REGIONS
                ),
            ],
            outputs=edit_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "prompt_3", "prompt_4")
        return schema.searchable(
            node, "regional prompt", "multi-text synthesis", "area prompt", "attention couple", "latent couple"
        )

    @classmethod
    def execute(
        cls, model, clip, prompt, prompt_1="", prompt_2="", prompt_3="", prompt_4="",
        mask_1=None, mask_2=None, mask_3=None, mask_4=None,
    ):  # fmt: skip
        host.check_unet(model)
        regions, masks = [], (mask_1, mask_2, mask_3, mask_4)
        for i, text, mask in zip(REGIONS, (prompt_1, prompt_2, prompt_3, prompt_4), masks, strict=True):
            if (mask is None) != (not text.strip()):
                there, missing = ("prompt", "mask") if mask is None else ("mask", "prompt")
                raise ValueError(
                    f"Region {i} has a {there} but no {missing}; give {missing}_{i} on Attune Region Prompts, or take "
                    f"{there}_{i} away."
                )
            if mask is not None and mask.any():
                regions.append((text, Mask(mask)))
            elif mask is not None:
                warn(
                    schema.node_id(cls),
                    f"mask_{i} is black, so prompt_{i} is read nowhere; paint white where it shall be (right-click "
                    "Load Image > Open in MaskEditor).",
                )
        if not regions:
            return io.NodeOutput(model.clone(), host.encode(clip, prompt))
        prompts = prompt, *(text for text, _ in regions)
        reads, texts = [host.read_words(clip, text) for text in prompts], [host.encode(clip, text) for text in prompts]
        host.check_texts(model, *texts)
        for read, text in zip(reads, texts, strict=True):
            host.check_length(read, text)
        tag, lengths = " | ".join(prompts), tuple(read.length for read in reads)
        controller = RegionPrompts(
            prompt=tag, tokens=sum(lengths), lengths=lengths, regions=tuple(mask for _, mask in regions)
        )
        # A hook that is scheduled on the CLIP gives one text for each of its stretches, the same ones for every prompt.
        positive = [
            [torch.cat([text for text, _ in together], 1), {**together[0][1], host.PROMPT: tag}]
            for together in zip(*texts, strict=True)
        ]
        return io.NodeOutput(host.install(model, [], [controller]), positive)


NODES = [AttuneFreePromptEditing, AttuneMutualSelfAttention, AttuneContextPreserving, AttuneRegionPrompts]
