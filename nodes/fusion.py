"""Edits inside a mask, led by a sketch (MaSaFusion), with or without an intermediate picture, turn after turn."""

import functools
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..attention_patches import host
from ..attention_patches import masked_fusion as fusion
from ..attention_patches.masks import fitted
from ..attention_patches.reference import Reference
from ..attention_patches.sketch import outlines
from ..attention_patches.values import Window
from ..inversion import host as runs
from ..inversion import report
from ..inversion import turns as history
from ..inversion.file import fingerprint
from ..inversion.trajectory import Trajectory, check_whole, negative_of
from . import schema
from .edit import check_model, check_painted, share, warn, warn_of_early_layer

NOISES = [fusion.GAUSSIAN, fusion.MIXED, fusion.INVERTED]
QUERIES = [*fusion.OUTSIDES]
BOTH, POSITIVE = "both", "positive only"
WINDOW = "start to end"


# ---- what they share ---------------------------------------------------------------------------------------------


def mask_input():
    return io.Mask.Input(
        "mask",
        tooltip=(
            "White where the picture may change: what is there now and where the new thing goes. A little loose is "
            "right; far too large loses the source's look."
        ),
    )


def window_inputs(what):
    return [
        share(
            "start",
            0.08,
            f"Share of the steps after which {what}. 0.08 of 50 steps is MasaCtrl's step 4; 0 keeps most.",
        ),
        share("end", 1.0, f"Share of the steps until which {what}. Start and end equal switch it off."),
        io.Int.Input(
            "layer",
            default=10,
            min=0,
            max=1000,
            tooltip=(
                "The first self-attention layer where that happens, counted from 0; Stable Diffusion 1.x has 16. "
                "Lower keeps more."
            ),
        ),
    ]


def source_input():
    return io.Conditioning.Input(
        "source",
        optional=True,
        tooltip="The source picture's caption. Without it, the text that the trajectory was made under.",
    )


def queries_input():
    return io.Combo.Input(
        "queries",
        options=QUERIES,
        default=QUERIES[0],
        optional=True,
        tooltip=(
            "Whose queries look the source up outside the mask. source's, which the paper prints, brings more of it "
            "back; with own, what is drawn looks up what comes nearest to it, as in MasaCtrl, and drifts further from "
            "it."
        ),
    )


def source_references(trajectory, source, negative):
    """The source picture, as read by the positive and by the negative rows of guidance."""
    texts = {fusion.SOURCE: source, fusion.SOURCE_NEGATIVE: negative_of(trajectory) or negative}
    return references_of(trajectory, texts)


def references_of(trajectory, texts):
    return [
        Reference(name, trajectory.sigmas, trajectory.latents, text, trajectory.steps) for name, text in texts.items()
    ]


def heard(references, node_id, begin=None):
    """The references, of which the first hears of a sampling that does not start on its trajectory or at ``begin``."""
    return [replace(references[0], tell=functools.partial(warn, node_id), begin=begin), *references[1:]]


def source_text(trajectory, source, node):
    if source is None:
        check_whole(trajectory, node)
    return trajectory.conditioning if source is None else source


def region_of(mask, trajectory, node):
    """The mask on the trajectory's latent pixels. Raises ValueError for one that leaves nothing to do."""
    if len(mask) not in (1, trajectory.latents.shape[1]):
        raise ValueError(
            f"The mask holds {len(mask)} masks, but the TRAJECTORY holds {trajectory.latents.shape[1]} pictures; "
            f"connect one mask to {node}, or one for each picture."
        )
    size = tuple(trajectory.latents.shape[-2:])
    region = fusion.region(fitted(mask, picture_size(trajectory)), size)
    check_painted(region.flatten(1).any(1).all(), "mask", node, "where the picture may change")
    return region


def picture_size(trajectory):
    """The (H, W) in pixels of the pictures of a trajectory."""
    return tuple(runs.PIXELS * side for side in trajectory.latents.shape[-2:])


def in_parts(region, outside, inside):
    """CONDITIONING of two parts: the text ``outside`` the region and ``inside`` it, both under the CONTROL_NET of the
    latter. A part without a pixel is left out."""
    parts, control = ((outside, fusion.OUTSIDE, 1 - region), (inside, fusion.INSIDE, region)), control_of(inside)
    return [one for text, name, r in parts if r.any() for one in host.part_of_picture(text, name, r, control)]


def control_of(conditioning):
    return conditioning[0][1].get("control")


def rules_of(region, window, layer, **kinds):
    """The controllers for the parts that hold a pixel; ``kinds`` are their classes as ``outside`` and ``inside``."""
    settings = {"tokens": None, "window": window, "layer": layer}
    named = {"outside": (fusion.OUTSIDE, 1 - region), "inside": (fusion.INSIDE, region)}
    return [kind(prompt=named[k][0], **settings) for k, kind in kinds.items() if named[k][1].any()]


def fused_outputs():
    return [
        io.Model.Output(
            "fused", display_name="model", tooltip="Draws the edit. The model that came in is not changed."
        ),
        io.Conditioning.Output("positive", display_name="positive", tooltip="For the sampler's positive."),
        io.Conditioning.Output("negative_parts", display_name="negative", tooltip="For the sampler's negative."),
        io.Latent.Output(
            "noise", display_name="latent", tooltip="Where the sampler starts: use it with adding noise switched off."
        ),
        io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="The steps to draw, for Sampler Custom with euler."),
    ]


# ---- nodes -------------------------------------------------------------------------------------------------------


class AttuneIntermediate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneIntermediate",
            display_name="Attune Intermediate",
            category="Attune/edit",
            description=(
                "Draws the intermediate picture of MaSaFusion: a T2I-Adapter gives what the prompt names the form of a "
                "sketch, and outside the mask the source is read. Its colours may be off; Attune Masked Fusion takes "
                "only its form."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                schema.Trajectory.Input("trajectory", tooltip="The source picture, from an Attune inversion."),
                io.Conditioning.Input("target", tooltip="What the edited picture shall show, from CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="The empty text, or what to stay away from."),
                io.ControlNet.Input(
                    "control_net",
                    tooltip="A T2I-Adapter from Load ControlNet Model (sketch, canny, pose, depth), or a ControlNet.",
                ),
                io.Image.Input(
                    "hint",
                    tooltip=(
                        "What it reads, for a sketch white lines on black: the whole picture as it shall be. Any size; "
                        "it is resized as Apply ControlNet does."
                    ),
                ),
                mask_input(),
                io.Vae.Input("vae", tooltip="Decodes the picture, for you to look at."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise that is drawn from, here and inside the mask of the fusion.",
                ),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    round=0.01,
                    tooltip="How strongly the prompt leads. Use the same in the sampler behind the fusion.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How strictly the form follows the hint; 0 leaves the adapter out.",
                ),
                share("start_percent", 0.0, "Share of the model's schedule after which the hint is followed."),
                share(
                    "end_percent",
                    1.0,
                    "Share of the schedule until which it is; lower it where a sketch's lines show in the picture.",
                ),
                io.Combo.Input(
                    "halves",
                    options=[BOTH, POSITIVE],
                    default=BOTH,
                    tooltip=(
                        "Whether the negative follows the hint too, as in T2I-Adapter's code, or only the positive, "
                        "which makes guidance press the form harder."
                    ),
                ),
                io.Combo.Input(
                    "start_noise",
                    options=NOISES,
                    default=NOISES[0],
                    tooltip="Where it starts. Pure gaussian noise is the paper's; its figure 4 compares the three.",
                ),
                *window_inputs("the source is read outside the mask"),
                source_input(),
                queries_input(),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "intermediate", display_name="intermediate", tooltip="For Attune Masked Fusion."
                ),
                io.Image.Output(
                    "image", display_name="image", tooltip="The form should be right and the rest about so."
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )
        schema.folded(
            node, "start_percent", "end_percent", "halves", "start_noise", "start", "end", "layer", "queries"
        )
        return schema.searchable(
            node, "masafusion", "t2i-adapter", "sketch", "controlnet", "intermediate image", "shape"
        )

    @classmethod
    def execute(
        cls, model, trajectory, target, negative, control_net, hint, mask, vae, seed, guidance, strength,
        start_percent, end_percent, halves, start_noise, start, end, layer, source=None, queries=QUERIES[0],
    ):  # fmt: skip
        name = "Attune Intermediate"
        Window(start_percent, end_percent, "start_percent to end_percent")
        host.check_plain(model)
        host.check_layers(model, [layer], "layer", name)
        warn_of_early_layer(model, layer, "layer", schema.node_id(cls))
        host.check_control(model, control_net, name)
        host.check_texts(model, target, negative)
        check_model(model, trajectory, schema.node_id(cls))
        region, source = region_of(mask, trajectory, name), source_text(trajectory, source, name)
        # The host would take alpha for a colour.
        hint = fitted(schema.rgb(hint).movedim(-1, 1), picture_size(trajectory)).movedim(1, -1)
        if float(hint.mean()) > 0.5:
            runs.say(schema.node_id(cls), "The hint is mostly bright; a sketch adapter reads white lines on black.")
        led, unled = host.apply_control(
            target, negative if halves == BOTH else [], control_net, hint, strength, start_percent, end_percent
        )
        unled = unled or negative
        rules = rules_of(region, Window(start, end, WINDOW), layer, outside=fusion.OUTSIDES[queries])
        fused = host.install(model, source_references(trajectory, source, negative), rules) if rules else model
        ours, theirs = host.own_controls(led, unled)
        positive, away = in_parts(region, source, ours), in_parts(region, negative, theirs)
        gaussian = runs.start_of(model, trajectory, seed)
        begin = fusion.start_noise(start_noise, gaussian, trajectory.noise, region)
        latent = runs.to_host_scale(model, begin)
        samples, path = runs.record(
            fused,
            torch.zeros_like(latent),
            guidance,
            runs.euler(),
            trajectory.sigmas,
            positive,
            away,
            latent,
            None,
            seed,
        )
        runs.check_path(path, name)
        header = {
            **runs.describe_model(model), "method": "intermediate", "prompt": schema.caption(cls, "target"),
            "seed": seed, "guidance": guidance, "source": fingerprint(trajectory.sigmas, trajectory.latents),
        }  # fmt: skip
        made = Trajectory(trajectory.sigmas, path, trajectory.steps, header, led, unled)
        return io.NodeOutput(made, vae.decode(samples))


class AttuneMaskedFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneMaskedFusion",
            display_name="Attune Masked Fusion",
            category="Attune/edit",
            description=(
                "Redraws what is in the mask in the form of the intermediate picture and leaves the rest as the source "
                "has it (MaSaFusion). For a new shape, an object that moves or one that is added, from a sketch."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectories were made with."),
                schema.Trajectory.Input("trajectory", tooltip="The source picture, from an Attune inversion."),
                schema.Trajectory.Input(
                    "intermediate",
                    tooltip="From Attune Intermediate, which also brings the target's prompt and its adapter.",
                ),
                mask_input(),
                *window_inputs("source and intermediate are read"),
                source_input(),
                queries_input(),
            ],
            outputs=fused_outputs(),
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "start", "end", "layer", "queries")
        return schema.searchable(node, "masafusion", "sketch edit", "shape change", "move object", "add object")

    @classmethod
    def execute(
        cls, model, trajectory, intermediate, mask, start, end, layer, source=None, queries=QUERIES[0]
    ):  # fmt: skip
        name = "Attune Masked Fusion"
        host.check_plain(model)
        host.check_layers(model, [layer], "layer", name)
        warn_of_early_layer(model, layer, "layer", schema.node_id(cls))
        for one in (trajectory, intermediate):
            check_model(model, one, schema.node_id(cls))
        check_pair(trajectory, intermediate)
        region, source = region_of(mask, trajectory, name), source_text(trajectory, source, name)
        target, negative = intermediate.conditioning, intermediate.negative
        (led,), (unled,) = host.own_controls(target), host.own_controls(negative)  # read in rows of their own
        read = {fusion.INTERMEDIATE: led, fusion.INTERMEDIATE_NEGATIVE: unled}
        plain = host.without_parts(negative)
        references = [*source_references(trajectory, source, plain), *references_of(intermediate, read)]
        window = Window(start, end, WINDOW)
        outside = fusion.OUTSIDES[queries]
        rules = rules_of(region, window, layer, outside=outside, inside=fusion.LikeIntermediate)
        target, negative = host.own_controls(target, negative)
        positive, away = in_parts(region, source, target), in_parts(region, plain, negative)
        positive = host.tell(positive, intermediate.header.get("prompt"), intermediate.header.get("seed"))
        begin = fusion.start_noise(fusion.MIXED, intermediate.noise, trajectory.noise, region)
        references = heard(references, schema.node_id(cls), begin)
        latent = {"samples": runs.to_host_scale(model, begin)}
        return io.NodeOutput(host.install(model, references, rules), positive, away, latent, trajectory.sigmas)


def check_pair(source, intermediate):
    """Raises ValueError for an intermediate that does not go with the source."""
    if not intermediate.conditioning or not intermediate.negative:
        raise ValueError(
            "The intermediate TRAJECTORY was made without a target or a negative CONDITIONING, but Attune Masked "
            "Fusion samples with both; connect the one from Attune Intermediate."
        )
    same = source.sigmas.shape == intermediate.sigmas.shape and torch.allclose(source.sigmas, intermediate.sigmas)
    if not same or source.latents.shape != intermediate.latents.shape:
        raise ValueError(
            f"The source TRAJECTORY has {describe(source)}, but the intermediate has {describe(intermediate)}; "
            "make the intermediate with Attune Intermediate from the TRAJECTORY that is connected to it."
        )
    made_from = intermediate.header.get("source")
    if made_from is not None and made_from != fingerprint(source.sigmas, source.latents):
        raise ValueError(
            "The intermediate was drawn beside another source than the one connected to Attune Masked Fusion; connect "
            "the same TRAJECTORY to it and to Attune Intermediate."
        )


def describe(trajectory):
    steps, pictures, _, height, width = trajectory.latents.shape
    first, last = float(trajectory.sigmas[0]), float(trajectory.sigmas[-1])
    return f"{steps - 1} steps from sigma {first:.4g} to {last:.4g} for {pictures} pictures of {width}x{height} latents"


class AttuneSourceFusion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneSourceFusion",
            display_name="Attune Source Fusion",
            category="Attune/edit",
            description=(
                "MaSaFusion without sketch and intermediate: draws the target's prompt out of what the source is made "
                "of, in the whole picture or in a mask. Good where the new thing has about the old one's form; the "
                "paper calls it unstable elsewhere."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                schema.Trajectory.Input("trajectory", tooltip="The source picture, from an Attune inversion."),
                io.Conditioning.Input("target", tooltip="What the edited picture shall show, from CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="The empty text, or what to stay away from."),
                *window_inputs("the source is read"),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "White where the picture may change; with one, the source may be read in all steps. Without "
                        "one the whole picture may change: then read it in some, such as 0 to 0.4."
                    ),
                ),
                source_input(),
                queries_input(),
            ],
            outputs=fused_outputs(),
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )
        schema.folded(node, "layer", "queries")
        return schema.searchable(node, "masafusion", "without adapter", "masked edit", "self-attention fusion")

    @classmethod
    def execute(
        cls, model, trajectory, target, negative, start, end, layer, mask=None, source=None, queries=QUERIES[0]
    ):  # fmt: skip
        name = "Attune Source Fusion"
        host.check_plain(model)
        host.check_texts(model, target, negative)
        host.check_layers(model, [layer], "layer", name)
        warn_of_early_layer(model, layer, "layer", schema.node_id(cls))
        check_model(model, trajectory, schema.node_id(cls))
        mask = torch.ones(1, 8, 8) if mask is None else mask
        region, source = region_of(mask, trajectory, name), source_text(trajectory, source, name)
        window = Window(start, end, WINDOW)
        rules = rules_of(region, window, layer, outside=fusion.OUTSIDES[queries], inside=fusion.FromSource)
        references = heard(source_references(trajectory, source, negative), schema.node_id(cls))
        fused = host.install(model, references, rules)
        positive, away = in_parts(region, source, target), in_parts(region, negative, negative)
        positive = host.tell(positive, schema.caption(cls, "target"), None)
        latent = {"samples": runs.host_latent(trajectory, 0)}
        return io.NodeOutput(fused, positive, away, latent, trajectory.sigmas)


class AttuneSketch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneSketch",
            display_name="Attune Sketch",
            category="Attune/mask",
            description=(
                "The outlines of a picture as white lines on black, which sketch and canny adapters read. Wipe lines "
                "out and draw new ones with masks: that is how a sketch says what shall change."
            ),
            inputs=[
                io.Image.Input("image", tooltip="The picture to trace, usually the source."),
                io.Float.Input(
                    "threshold",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="The step in a colour that makes a line. Lower draws fainter edges too.",
                ),
                io.Float.Input(
                    "smooth",
                    default=1.0,
                    min=0.0,
                    max=20.0,
                    step=0.5,
                    round=0.01,
                    tooltip="Blur before looking, in pixels. Higher leaves textures out and rounds corners.",
                ),
                io.Int.Input("width", default=2, min=1, max=50, tooltip="Width of the lines in pixels."),
                io.Mask.Input(
                    "erase", optional=True, tooltip="White where lines are wiped out, such as the old object."
                ),
                io.Mask.Input("draw", optional=True, tooltip="White where lines are added; paint the new outline."),
            ],
            outputs=[
                io.Image.Output("sketch", display_name="sketch", tooltip="For the hint of Attune Intermediate."),
            ],
        )
        return schema.searchable(node, "edges", "canny", "lineart", "scribble", "preprocessor", "hint", "pidinet")

    @classmethod
    def execute(cls, image, threshold, smooth, width, erase=None, draw=None):
        # Picture by picture, since nothing hears Cancel inside.
        pictures = runs.each(schema.rgb(image).split(1))
        lines = torch.cat([outlines(one, threshold, smooth, width) for one in pictures])
        if erase is not None:
            lines = lines * (1 - marked(erase, lines, "erase"))
        if draw is not None:
            lines = torch.maximum(lines, marked(draw, lines, "draw"))
        return io.NodeOutput(lines[..., None].repeat(1, 1, 1, 3))


def check_turn(source, edited):
    """Raises ValueError for an edit that was not drawn beside the source on its grid."""
    check_whole(edited, "Attune Next Turn")
    same = source.sigmas.shape == edited.sigmas.shape and torch.allclose(source.sigmas, edited.sigmas, rtol=1e-4)
    if not same or source.latents.shape != edited.latents.shape:
        raise ValueError(
            f"The source TRAJECTORY has {describe(source)}, but the edited one has {describe(edited)}; draw the edit "
            "with Attune Record Trajectory on the sigmas of the trajectory that is connected to Attune Next Turn."
        )


def marked(mask, lines, name):
    """The pixels of ``lines`` (B, H, W) that a mask has white in, 0 or 1. Raises ValueError for another number."""
    if len(mask) not in (1, len(lines)):
        raise ValueError(
            f"{name} holds {len(mask)} masks, but the image holds {len(lines)} pictures; connect one mask to Attune "
            "Sketch, or one for each picture."
        )
    size = tuple(lines.shape[1:])
    return fusion.region(fitted(mask, size), size).to(lines)


class AttuneNextTurn(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneNextTurn",
            display_name="Attune Next Turn",
            category="Attune/edit",
            description=(
                "Ends a turn of editing: makes the finished edit the source of the next, without decoding and encoding "
                "it, and gives the picture with every pixel that no mask ever touched exactly as it came."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="The source that this turn edited."),
                schema.Trajectory.Input(
                    "edited",
                    tooltip="The edit, drawn by Attune Record Trajectory in place of a sampler, on the same sigmas.",
                ),
                io.Mask.Input("mask", tooltip="White where this turn could change the picture."),
                io.Image.Input("image", tooltip="The very first picture, before any turn."),
                io.Vae.Input("vae", tooltip="Decodes the finished picture."),
                io.Int.Input(
                    "feather",
                    default=4,
                    min=0,
                    max=256,
                    tooltip="How softly new goes over into old, in pixels inside the mask; 0 cuts.",
                ),
                schema.Turns.Input(
                    "turns", optional=True, tooltip="From the Attune Next Turn before; none in the first."
                ),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "source", display_name="trajectory", tooltip="The source of the next turn, with its text."
                ),
                io.Image.Output("picture", display_name="image", tooltip="The picture after this turn."),
                schema.Turns.Output("all_turns", display_name="turns", tooltip="For the next Attune Next Turn."),
                io.String.Output("history", display_name="history", tooltip="Prompt, seed and mask of every turn."),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return schema.searchable(node, "multi-turn", "iterative editing", "history", "chain edits", "composite")

    @classmethod
    def execute(cls, trajectory, edited, mask, image, vae, feather, turns=None):
        name = "Attune Next Turn"
        check_turn(trajectory, edited)
        region = region_of(mask, trajectory, name)
        inside = host.of_part(edited.conditioning, fusion.INSIDE) or edited.conditioning
        away = host.of_part(edited.negative, fusion.INSIDE) or edited.negative
        prompt, seed = host.told(inside)
        source = history.next_source(
            trajectory, edited, region, host.without_parts(inside), host.without_parts(away),
            prompt or edited.header.get("prompt"),
        )  # fmt: skip
        finished = runs.decode(vae, source, source.latents[-1])
        size = tuple(finished.shape[1:3])
        touched = fusion.region(fitted(mask, size), size)
        if turns is not None and turns.touched.shape[1:] != touched.shape[1:]:
            (height, width), (h, w) = touched.shape[1:], turns.touched.shape[1:]
            raise ValueError(
                f"The picture is {width}x{height}, but the turns are of one of {w}x{h}; connect to Attune Next Turn "
                "the turns and the trajectories of one picture."
            )
        first = report.fit(schema.rgb(image), finished, name)
        seed = edited.header.get("seed") if seed is None else seed
        turn = history.Turn(source.header["prompt"], seed, float(touched.mean()))
        turns = history.Turns((turn,), touched) if turns is None else turns.then(turn, touched)
        picture = history.paste(first, finished, turns.touched, feather)
        return io.NodeOutput(source, picture, turns, turns.text(), ui={"text": (turns.text(),)})


NODES = [AttuneIntermediate, AttuneMaskedFusion, AttuneSourceFusion, AttuneSketch, AttuneNextTurn]
