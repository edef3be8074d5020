"""From a picture to a trajectory, and what makes its way back hold under guidance."""

import math
from dataclasses import replace

from comfy_api.latest import io

from ..attention_patches.host import check_plain, check_texts, check_unet
from ..inversion import ddim, direct, host, null_text, unfinished
from ..inversion.trajectory import Trajectory, check_whole, negative_of, one_text
from . import schema
from .edit import check_model, warn

GRIDS = [host.HOST_GRID, host.PAPERS_GRID]
GIVEN = "given"  # what a trajectory says of its grid where the levels came from another node
LEVELS = [ddim.LATER, ddim.CURRENT]
HOW_TO_DRAW = "The way back, for Sampler Custom. Use it with euler."


class AttuneDDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneDDIMInversion",
            display_name="Attune DDIM Inversion",
            category="Attune/invert",
            description=(
                "Finds the noise that a picture would be drawn from, and keeps every step of the way. An edit reads "
                "that way to leave the rest of the picture as it is."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that will draw the edit."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode. A batch is inverted together."),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip=(
                        "The picture's caption, from CLIP Text Encode; an empty text works too and suits edits that "
                        "have no source prompt. The closer the caption, the better the picture comes back."
                    ),
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=500,
                    tooltip=(
                        "How many steps to walk. More bring the picture back more faithfully and take longer. Where "
                        "1000 is not a multiple of it, ComfyUI's grid may have one more."
                    ),
                ),
                io.Combo.Input(
                    "grid",
                    options=GRIDS,
                    default=GRIDS[0],
                    tooltip=(
                        "Which noise levels are visited. The host's are those of ComfyUI's ddim_uniform scheduler; the "
                        "papers' other grid ends one training step lower and takes one step fewer."
                    ),
                ),
                io.Combo.Input(
                    "epsilon",
                    options=LEVELS,
                    default=LEVELS[0],
                    tooltip="At which noise level each step asks the model. The papers' code asks at the later one.",
                ),
                io.Int.Input(
                    "refine",
                    default=0,
                    min=0,
                    max=20,
                    optional=True,
                    tooltip=(
                        "Further evaluations a step that make it the exact reverse of the drawing step. 0 is what the "
                        "papers do; 2 or 3 bring the picture back more faithfully and take that many times longer."
                    ),
                ),
                io.Float.Input(
                    "guidance",
                    default=1.0,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    round=0.01,
                    optional=True,
                    tooltip=(
                        "How strongly the caption leads the inversion. 1 is what the papers do and what edits expect; "
                        "higher needs a negative and comes back less faithfully."
                    ),
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What guidance leads away from, usually the empty text. Only read where guidance is not 1.",
                ),
                io.Sigmas.Input(
                    "levels",
                    optional=True,
                    tooltip=(
                        "Noise levels of another scheduler, such as Karras or Align Your Steps, in the place of steps "
                        "and grid. The sampler then takes this node's sigmas all the same."
                    ),
                ),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "trajectory",
                    display_name="trajectory",
                    tooltip="The way from noise to picture, for Attune's edit nodes.",
                ),
                io.Latent.Output(
                    "noise",
                    display_name="noise",
                    tooltip="Where the sampler starts: use it with adding noise switched off.",
                ),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip=HOW_TO_DRAW),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )
        schema.folded(node, "epsilon", "guidance")
        return schema.searchable(node, "ddim inversion", "invert", "real image editing", "image to noise", "unsample")

    @classmethod
    def execute(
        cls, model, latent, conditioning, steps, grid, epsilon, refine=0, guidance=1.0, negative=None, levels=None
    ):  # fmt: skip
        check_plain(model)
        picture = latent["samples"]
        host.check_latent(model, picture, "latent of Attune DDIM Inversion")
        if guidance == 1:
            negative = None
        elif negative is None:
            raise ValueError(
                f"The guidance is {guidance:g} but nothing is connected to negative; connect an empty CLIP Text Encode "
                "to Attune DDIM Inversion, or set its guidance to 1."
            )
        check_texts(model, conditioning, negative or [])
        if levels is not None:
            grid = GIVEN
        sigmas = host.schedule(model, steps, grid) if levels is None else host.whole_schedule(model, levels)
        if grid == host.HOST_GRID and abs(len(sigmas) - 1 - steps) > 1:
            warn(
                schema.node_id(cls),
                f"The grid has {len(sigmas) - 1} steps and not {steps}, since ComfyUI's ddim_uniform takes every n-th "
                "noise level of the MODEL's table; connect this node's sigmas to the sampler, or choose other steps.",
            )
        lowest = host.lowest_sigma(model)

        def body(denoise, start, report):
            start = ddim.placed(start, sigmas[-1])
            return ddim.invert(denoise, start, sigmas, epsilon, lowest, report, refine)

        path = host.walk(model, conditioning, picture, sigmas, body, negative, guidance).cpu()
        host.check_path(path, "Attune DDIM Inversion")
        header = {
            **host.describe_model(model), "method": "ddim", "grid": grid, "epsilon": epsilon, "refine": refine,
            "guidance": guidance, "prompt": schema.caption(cls, "conditioning"),
        }  # fmt: skip
        # The papers' own grid has a last step onto itself, which is left out of the walk but counts.
        counted = len(sigmas) if grid == host.PAPERS_GRID else len(sigmas) - 1
        trajectory = Trajectory(sigmas, path, counted, header, conditioning, negative or [])
        noise = {**latent, "samples": host.to_host_scale(model, trajectory.noise)}
        # A mask in the latent would keep the sampler from drawing there, on the way back too.
        noise.pop("noise_mask", None)
        return io.NodeOutput(trajectory, noise, sigmas)


class AttuneNullTextInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneNullTextInversion",
            display_name="Attune Null-Text Inversion",
            category="Attune/invert",
            description=(
                "Learns, for every step, an embedding for the sampler's negative with which the picture comes back "
                "although guidance is high (null-text inversion). Cancel loses nothing: the next run with the same "
                "settings goes on where it stopped."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="The picture's way, from Attune DDIM Inversion."),
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                io.Conditioning.Input("negative", tooltip="Where learning begins: the empty text, CLIP Text Encoded."),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.5,
                    round=0.01,
                    tooltip="The guidance (cfg) that you will draw with. The embeddings fit this one only.",
                ),
                io.Int.Input(
                    "inner_steps",
                    default=10,
                    min=1,
                    max=500,
                    tooltip=(
                        "Most updates at each step; 10 is the paper's. More bring the picture back more faithfully "
                        "and take longer. 5 at twice the learning rate come out alike in half the time."
                    ),
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=0.0001,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Size of the updates; it falls to half over the run. Lower it when the loss jumps about.",
                ),
                io.Float.Input(
                    "early_stop",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip=(
                        "A step is good enough at this loss, plus up to 0.001 that grows over the run. Higher is "
                        "faster and less faithful; 0 never stops early."
                    ),
                ),
                io.Boolean.Input(
                    "warm_start",
                    default=True,
                    tooltip=(
                        "On, each step starts from what the step before it learned, as in the paper; off, from the "
                        "empty text, as in Dynamic Prompt Learning's code."
                    ),
                ),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "learned", display_name="trajectory", tooltip="The same way, with the null embeddings in it."
                ),
                io.Conditioning.Output(
                    "null",
                    display_name="negative",
                    tooltip=(
                        "For the sampler's negative, in any sampler that draws along this trajectory's sigmas at this "
                        "guidance."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        schema.folded(node, "learning_rate", "early_stop", "warm_start")
        return schema.searchable(node, "null-text inversion", "nti", "null text optimization", "real image editing")

    @classmethod
    def execute(
        cls, trajectory, model, negative, guidance, inner_steps, learning_rate, early_stop, warm_start,
    ):  # fmt: skip
        check_plain(model)
        check_model(model, trajectory, schema.node_id(cls))
        check_whole(trajectory, "Attune Null-Text Inversion")
        one_text(negative, "negative", "connect one CLIP Text Encode to negative")
        check_texts(model, negative)
        if trajectory.learned is None:  # with learned words there is one text a step
            one_text(trajectory.conditioning, "TRAJECTORY's", "invert the image under one CLIP Text Encode")
        settings = null_text.NullText(guidance, inner_steps, learning_rate, early_stop, warm_start)
        learned = unfinished.learn(model, trajectory, negative, settings, schema.node_id(cls))
        header = {
            **trajectory.header, "method": "null-text", "null_text_guidance": guidance, "inner_steps": inner_steps,
            "learning_rate": learning_rate, "early_stop": early_stop, "warm_start": warm_start,
        }  # fmt: skip
        trajectory = replace(
            trajectory, header=header, negative=negative, nulls=learned, windows=host.windows(model, trajectory.sigmas)
        )
        return io.NodeOutput(trajectory, negative_of(trajectory))


class AttuneDirectInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneDirectInversion",
            display_name="Attune Direct Inversion",
            category="Attune/invert",
            description=(
                "Pins the source to its trajectory at every step (direct inversion, PnP Inversion). Every Attune edit "
                "does so by itself: with every 1 and scale 1 this node hands the trajectory through. The rest are the "
                "paper's ablations: a source that is pinned less often, or only part of the way."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="The picture's way, from Attune DDIM Inversion."),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=500,
                    tooltip="Pin at every so many steps. 1 keeps the source exact; more lets it drift in between.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip="How far a pin pulls: 1 all the way, 0 not at all, which is plain DDIM under guidance.",
                ),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    round=0.01,
                    tooltip="The guidance that the source is drawn with between pins. Only read in the ablations.",
                ),
                io.Model.Input("model", optional=True, tooltip="Draws the source between pins, in the ablations."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The empty text, for the guidance in the ablations."
                ),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "pinned", display_name="trajectory", tooltip="The way that an edit reads its source from."
                )
            ],
        )
        schema.folded(node, "every", "scale", "guidance")
        return schema.searchable(node, "direct inversion", "pnp inversion", "pinned source", "source branch")

    @classmethod
    def execute(cls, trajectory, every, scale, guidance, model=None, negative=None):
        header = {**trajectory.header, "method": "direct", "every": every, "scale": scale}
        if every == 1 and scale == 1:
            return io.NodeOutput(replace(trajectory, header=header))
        if model is None or negative is None:
            raise ValueError(
                f"With every {every} and scale {scale:g} the source is sampled between pins, for which a model and a "
                "negative are needed; connect both to Attune Direct Inversion, or set every and scale to 1."
            )
        check_plain(model)
        check_texts(model, negative)
        check_model(model, trajectory, schema.node_id(cls))
        check_whole(trajectory, "Attune Direct Inversion")

        def body(denoise, start, report):
            return direct.pull(denoise, trajectory.sigmas, trajectory.latents.to(start), every, scale, report)

        start = host.host_latent(trajectory, 0)
        path = host.walk(model, trajectory.conditioning, start, trajectory.sigmas, body, negative, guidance).cpu()
        host.check_path(path, "Attune Direct Inversion")
        return io.NodeOutput(replace(trajectory, latents=path, header={**header, "direct_guidance": guidance}))


class AttuneNegativePromptInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneNegativePromptInversion",
            display_name="Attune Negative-Prompt Inversion",
            category="Attune/invert",
            description=(
                "Puts the picture's own caption in the place of the empty text, so that guidance cancels out for the "
                "source (negative-prompt inversion). Costs nothing; null-text inversion is what it approximates."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="The picture's way, from Attune DDIM Inversion."),
                io.Float.Input(
                    "interpolation",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip=(
                        "How far from the caption towards the empty text the negative lies. 0 is the paper's and "
                        "brings the image back best; higher lets the edit show more and the image come back less, up "
                        "to plain guidance at 1. 0.1 to 0.3 where an edit is too weak."
                    ),
                ),
                io.Conditioning.Input(
                    "empty",
                    optional=True,
                    tooltip="The empty text, from CLIP Text Encode. Only read where interpolation is not 0.",
                ),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "learned", display_name="trajectory", tooltip="The same way, with the caption as its negative."
                ),
                io.Conditioning.Output("null", display_name="negative", tooltip="For the sampler's negative."),
            ],
        )
        schema.folded(node, "interpolation")
        return schema.searchable(node, "negative-prompt inversion", "npi", "proxnpi", "optimization-free inversion")

    @classmethod
    def execute(cls, trajectory, interpolation=0.0, empty=None):
        check_whole(trajectory, "Attune Negative-Prompt Inversion")
        negative, header = trajectory.conditioning, {**trajectory.header, "method": "negative-prompt"}
        if interpolation:
            if empty is None:
                raise ValueError(
                    f"The interpolation is {interpolation:g}, but nothing is connected to empty; connect an empty CLIP "
                    "Text Encode to Attune Negative-Prompt Inversion, or set its interpolation to 0."
                )
            negative = host.between(negative, empty, interpolation)
            header["interpolation"] = interpolation
        learned = replace(trajectory, header=header, negative=negative, nulls=None)
        return io.NodeOutput(learned, negative_of(learned))


class AttuneRecordTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneRecordTrajectory",
            display_name="Attune Record Trajectory",
            category="Attune/invert",
            description=(
                "Draws a picture as Sampler Custom does, to the last bit, and keeps every step of the way, so that a "
                "generated picture is edited exactly like a real one."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that draws."),
                io.Boolean.Input("add_noise", default=True, tooltip="Off where the latent is noise already."),
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another number draws another picture.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance: how strongly the prompt leads.",
                ),
                io.Conditioning.Input("positive", tooltip="What to draw; it becomes the source prompt of edits."),
                io.Conditioning.Input("negative", tooltip="What to stay away from."),
                io.Sampler.Input(
                    "sampler", tooltip="Any that asks the model at every one of the sigmas; euler edits best."
                ),
                io.Sigmas.Input("sigmas", tooltip="The noise levels to visit, from any scheduler."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture to start from."),
            ],
            outputs=[
                schema.Trajectory.Output(
                    "trajectory", display_name="trajectory", tooltip="The way that the picture took, for edits."
                ),
                io.Latent.Output("drawn", display_name="picture", tooltip="The finished picture, for VAE Decode."),
                io.Latent.Output(
                    "noise", display_name="noise", tooltip="Where it started: use it with adding noise switched off."
                ),
                io.Sigmas.Output("visited", display_name="sigmas", tooltip="The sigmas that came in, for the edit."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )
        return schema.searchable(node, "record", "generated image editing", "keep latents", "sampler")

    @classmethod
    def execute(cls, model, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image):
        check_unet(model)
        check_texts(model, positive, negative)
        if not host.falls(sigmas):
            raise ValueError(
                f"The SIGMAS are {len(sigmas)} levels that do not fall from noise to picture; connect a scheduler to "
                "Attune Record Trajectory, without Flip Sigmas."
            )
        picture = host.fitting_latent(model, latent_image["samples"])
        host.check_latent(model, picture, "latent_image of Attune Record Trajectory")
        latent = {**latent_image, "samples": picture}
        noise = host.noise_for(latent, noise_seed) if add_noise else picture.new_zeros(picture.shape, device="cpu")
        samples, path = host.record(
            model, noise, cfg, sampler, sigmas, positive, negative, picture, latent.get("noise_mask"), noise_seed
        )
        host.check_path(path, "Attune Record Trajectory")
        prompt = schema.caption(cls, "positive")
        seed = noise_seed if add_noise else None
        header = {**host.describe_model(model), "method": "recorded", "guidance": cfg, "prompt": prompt, "seed": seed}
        # The papers' grid ends at the lowest noise level, where they count a step onto itself.
        papers = math.isclose(float(sigmas[-1]), host.lowest_sigma(model), rel_tol=1e-3)
        trajectory = Trajectory(sigmas.cpu().float(), path, len(sigmas) - 1 + papers, header, positive, negative)
        start = {**latent, "samples": host.to_host_scale(model, trajectory.noise)}
        start.pop("noise_mask", None)
        return io.NodeOutput(trajectory, {**latent, "samples": samples}, start, sigmas)


NODES = [
    AttuneDDIMInversion,
    AttuneNullTextInversion,
    AttuneDirectInversion,
    AttuneNegativePromptInversion,
    AttuneRecordTrajectory,
]
