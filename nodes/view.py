"""Seeing: attention maps and pictures side by side."""

import functools

import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..attention_patches import host, maps, masks, self_maps
from ..attention_patches.words import read_list
from ..inversion import host as runs
from ..inversion.trajectory import Trajectory
from . import schema, sheet
from .edit import check_model, check_painted, kept_vectors, warn_of_another_clip

STEPS_AVERAGE, STEPS_EACH = "average", "each"
STEPS = (STEPS_AVERAGE, STEPS_EACH)
LATENT_STEPS = 50  # noise levels of which a finished picture is looked at at every n-th
LATENT_SEED = 0
ONE_PLACE = "one place"


def noised_path(model, latent):
    """A finished picture with one fixed noise at every level of the host's schedule, in a trajectory's form."""
    runs.check_latent(model, latent["samples"], "latent of Attune Attention Maps")
    sigmas = runs.schedule(model, LATENT_STEPS, runs.HOST_GRID)
    clean = runs.to_model_scale(model, latent["samples"]).float().cpu()
    path = maps.noised(clean, runs.noise_for(latent, LATENT_SEED), sigmas)
    return Trajectory(sigmas, path, len(sigmas) - 1, runs.describe_model(model))


def as_drawn(latents, sigmas, step):
    """(x, sigma) of a step of a trajectory: what its drawing asks the model for."""
    return latents[step], float(sigmas[step])


def look(model, conditioning, trajectory, every, receive, before, at=as_drawn):
    """Runs the UNet once on every n-th step of a trajectory; ``receive`` sees each attention layer.

    ``before(i, evaluate)`` is called before each step with its number and a function that runs it once more.
    ``at(latents, sigmas, step)`` gives the x and sigma that are looked at.
    """

    def body(denoise, start, report):
        for i in range(0, len(trajectory.sigmas) - 1, every):
            x, sigma = at(trajectory.latents, trajectory.sigmas, i)
            x = x.to(start)
            before(i, functools.partial(denoise, x, sigma))
            report(i, denoise(x, sigma), x)

    host.check_texts(model, conditioning)
    picture = runs.to_host_scale(model, trajectory.latents[-1])
    runs.walk(host.recording(model, receive), conditioning, picture, trajectory.sigmas, body)


class AttuneAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneAttentionMaps",
            display_name="Attune Attention Maps",
            category="Attune/view",
            description=(
                "Shows where each word of a prompt looks in a picture: its cross-attention, averaged or layer by layer "
                "and step by step, as one labelled picture; and one word's map as a mask."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the picture was made with."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                schema.Trajectory.Input(
                    "trajectory",
                    optional=True,
                    tooltip=(
                        "The picture to look into, from an Attune inversion or recorder. Or connect a latent. Words "
                        "that Attune Dynamic Prompt has learned are shown as they were and as learned."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red circle on a gray background",
                    tooltip="The words to look for. Words that the picture does not show still get a map.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip=(
                        "Which words to show, with commas between; empty shows every word of the prompt. <start>, "
                        "<end> and <padding> are the tokens around the words."
                    ),
                ),
                io.Int.Input(
                    "tokens",
                    default=256,
                    min=1,
                    max=1 << 20,
                    tooltip=(
                        "Which level of the model to show: the one whose picture tokens come nearest to this. 256 is "
                        "16x16, where words and objects match best in SD 1.5."
                    ),
                ),
                io.Int.Input(
                    "every",
                    default=5,
                    min=1,
                    max=1000,
                    tooltip="Looks at every n-th step only. Lower is slower and hardly changes the average.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "A finished picture in the place of a trajectory, from a sampler or VAE Encode. It is looked "
                        f"at under one fixed noise, at every n-th of {LATENT_STEPS} noise levels."
                    ),
                ),
                io.Combo.Input(
                    "layers",
                    options=list(maps.CHOICES),
                    default=maps.NEAREST,
                    optional=True,
                    tooltip=(
                        "Which layers: the average of all at the level nearest to tokens, the same within the UNet's "
                        "way down, middle or way up, or each layer by itself."
                    ),
                ),
                io.Int.Input(
                    "layer",
                    default=-1,
                    min=-1,
                    max=1000,
                    optional=True,
                    tooltip=(
                        "A single layer by its number in the order in which the UNet runs, 0 to 15 in SD 1.5, in the "
                        "place of layers; -1 leaves it to layers."
                    ),
                ),
                io.Combo.Input(
                    "steps",
                    options=list(STEPS),
                    default=STEPS_AVERAGE,
                    optional=True,
                    tooltip="The average of the steps, or each of those looked at by itself.",
                ),
                io.String.Input(
                    "mask_word",
                    default="",
                    optional=True,
                    tooltip="The word whose map becomes the mask, wherever it stands in the prompt; empty takes the "
                    "first that is shown. <start>, <end> and <padding> do, too.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    optional=True,
                    tooltip=(
                        "The mask is white where the word's map, scaled to 0 to 1, reaches this. Higher keeps less; "
                        "0 gives the soft map."
                    ),
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-256,
                    max=256,
                    optional=True,
                    tooltip="Pixels by which the mask reaches further; below 0 it shrinks.",
                ),
                io.Int.Input(
                    "feather",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    tooltip="Pixels over which the mask's edge fades to either side.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "maps", display_name="maps", tooltip="One map a word, brightest where the word looks most."
                ),
                schema.Maps.Output(
                    "raw",
                    display_name="raw",
                    tooltip="The maps themselves, not scaled: probabilities, for other nodes.",
                ),
                io.Mask.Output(
                    "mask", display_name="mask", tooltip="One word's map at the picture's size, white where it looks."
                ),
            ],
        )
        schema.folded(node, "layer", "grow", "feather")
        return schema.searchable(node, "cross-attention map", "heat map", "daam", "token map", "visualize attention")

    @classmethod
    def execute(
        cls, model, clip, trajectory=None, prompt="", words="", tokens=256, every=5, latent=None, layers=maps.NEAREST,
        layer=-1, steps=STEPS_AVERAGE, mask_word="", threshold=0.3, grow=0, feather=0,
    ):  # fmt: skip
        host.check_plain(model)
        if (trajectory is None) == (latent is None):
            raise ValueError(
                f"Attune Attention Maps has {'no' if latent is None else 'both a'} trajectory "
                f"{'or' if latent is None else 'and a'} latent, but shows the maps of one image; connect one of them."
            )
        if trajectory is None:
            trajectory = noised_path(model, latent)
        check_model(model, trajectory, schema.node_id(cls))
        read = host.read_words(clip, prompt)
        chosen = read_list(words)
        change = "words or the prompt on Attune Attention Maps"
        shown = [(w, p) for w in chosen for p in read.find_any(w, change)]
        shown = shown or [(w.text, w.positions) for w in read.words]
        if not shown:
            raise ValueError("The prompt is empty, but a map belongs to a word; write one in Attune Attention Maps.")
        masked = shown[0]
        if mask_word.strip():
            change = "mask_word or the prompt on Attune Attention Maps"
            places = (p for found in read.find_any(mask_word, change) for p in found)
            masked = mask_word.strip(), tuple(dict.fromkeys(places))
            shown += [masked] * (masked[1] not in [p for _, p in shown])
        names, positions = zip(*shown, strict=True)
        choice = layer if layer >= 0 else layers, tokens, steps == STEPS_EACH, len(trajectory.sigmas) - 1

        def gather(conditioning):
            gathered = maps.MapSum(positions)

            def receive(place, own, heads):
                if place.kind == "cross":
                    gathered.add(place, own, heads)

            def before(step, _):
                gathered.step = step

            look(model, conditioning, trajectory, every, receive, before)
            return gathered.collect(names, *choice)

        text = host.encode(clip, prompt, trajectory.conditioning)
        host.check_length(read, text)
        warn_of_another_clip(clip, trajectory, schema.node_id(cls), text)
        found = gather(text)
        number = positions.index(masked[1])
        if kept := kept_vectors(clip, trajectory, prompt):
            learned = set().union(*kept.values())
            which = [i for i, at in enumerate(positions) if learned & set(at)]
            texts = host.encode_steps(clip, prompt, kept, trajectory.windows, trajectory.conditioning)
            found = maps.beside(found, gather(texts), which, "learned")
            number += sum(i < number for i in which) + (number in which)  # of a learned word, what was learned
        size = [runs.PIXELS * side for side in trajectory.latents.shape[-2:]]
        mask = maps.mask_of(found, number, size, threshold, grow, feather)
        return io.NodeOutput(sheet.map_sheet(found, maps.stretch, runs.each), found, mask)


class AttuneSelfAttentionView(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneSelfAttentionView",
            display_name="Attune Self-Attention View",
            category="Attune/view",
            description=(
                "Shows which parts of a picture the model takes as belonging together: the main components of its "
                "self-attention, and the picture cut into clusters by it; or where one place of it looks."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                schema.Trajectory.Input(
                    "trajectory", tooltip="The picture to look into, from an Attune inversion or recorder."
                ),
                io.Int.Input(
                    "tokens",
                    default=1024,
                    min=1,
                    max=self_maps.LIMIT,
                    tooltip=(
                        "Which level of the model to look at: the one whose picture tokens come nearest to this. 1024 "
                        "is 32x32, as in Dynamic Prompt Learning; fewer is coarser and quicker."
                    ),
                ),
                io.Int.Input(
                    "every",
                    default=5,
                    min=1,
                    max=1000,
                    tooltip="Looks at every n-th step only. Lower is slower and hardly changes the pictures.",
                ),
                io.Combo.Input(
                    "method",
                    options=[*self_maps.KINDS, ONE_PLACE],
                    default=self_maps.PCA,
                    tooltip=(
                        "PCA shows in what the picture's parts differ most (Dynamic Prompt Learning's figures); SVD "
                        "what is looked at most in common (Prompt-to-Prompt's and Free-Prompt-Editing's); one place "
                        "where the tokens at x and y, or under the mask, look (as in CPAM's figure 7)."
                    ),
                ),
                io.Int.Input("count", default=3, min=1, max=16, tooltip="How many components to show."),
                io.Int.Input(
                    "clusters",
                    default=5,
                    min=2,
                    max=16,
                    tooltip="Into how many parts to cut the picture. More tells smaller things apart.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Where the clustering starts; the best of ten starts is kept, so this changes little.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The checkpoint's text encoder; only needed with a prompt."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Empty looks under the conditioning that the trajectory was made under.",
                ),
                io.Combo.Input(
                    "of",
                    options=[self_maps.MAPS, *self_maps.FEATURES],
                    default=self_maps.MAPS,
                    optional=True,
                    tooltip=(
                        "What components and clusters are made of: where tokens look, or the queries, keys or values "
                        "that self-attention is made of. Maps follow objects best. Features go with PCA."
                    ),
                ),
                io.Float.Input(
                    "x",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    optional=True,
                    tooltip="For one place: where it is across the picture, 0 the left edge and 1 the right.",
                ),
                io.Float.Input(
                    "y",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    optional=True,
                    tooltip="For one place: where it is down the picture, 0 the upper edge and 1 the lower.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For one place: all that is white, in the place of x and y; the mean of its tokens.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="For one place: the picture to draw it on. Without one the map stands alone.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "components",
                    display_name="components",
                    tooltip="Each component, and the first three as colours; or the one place and where it looks.",
                ),
                io.Image.Output(
                    "parts",
                    display_name="clusters",
                    tooltip="The clusters as colours, with their share of the picture; none for one place.",
                ),
                io.Mask.Output(
                    "masks",
                    display_name="masks",
                    tooltip=(
                        "One mask a cluster, the largest first, at the picture's size; picture after picture. For one "
                        "place where it looks, from 0 to 1."
                    ),
                ),
            ],
        )
        schema.folded(node, "method", "seed", "of", "x", "y")
        names = "self-attention map", "pca", "svd", "k-means", "segmentation", "clusters", "pixel attention"
        return schema.searchable(node, *names)

    @classmethod
    def execute(
        cls, model, trajectory, tokens, every, method, count, clusters, seed, clip=None, prompt="", of=self_maps.MAPS,
        x=0.5, y=0.5, mask=None, image=None,
    ):  # fmt: skip
        host.check_plain(model)
        check_model(model, trajectory, schema.node_id(cls))
        if prompt.strip() and clip is None:
            raise ValueError(
                "Attune Self-Attention View has a prompt but no CLIP to read it with; connect the checkpoint's clip, "
                "or leave the prompt empty."
            )
        if of != self_maps.MAPS and method != self_maps.PCA:
            raise ValueError(
                f"Attune Self-Attention View is to show the {of} by the method {method}, which is for self-attention "
                f"maps alone; set of to {self_maps.MAPS}, or method to {self_maps.PCA}."
            )
        conditioning = trajectory.conditioning
        if prompt.strip():
            conditioning = host.encode(clip, prompt, conditioning)
        if not conditioning:
            raise ValueError(
                "The TRAJECTORY holds no conditioning to look under; write its caption into the prompt of Attune "
                "Self-Attention View and connect clip."
            )
        size = [runs.PIXELS * side for side in trajectory.latents.shape[-2:]]
        pictures = trajectory.latents.shape[1]
        if method == ONE_PLACE:
            gathered = self_maps.PlaceSum(_weights((x, y), mask, pictures, size))
            image = _beside(image, pictures)
        elif of == self_maps.MAPS:
            gathered = self_maps.SelfSum(pictures)
        else:
            gathered = self_maps.FeatureSum(pictures, self_maps.FEATURES[of])

        def receive(place, own, heads):
            if place.kind == "self":
                gathered.add(place, own, heads)

        if method == ONE_PLACE:
            look(model, conditioning, trajectory, every, receive, lambda *_: None)
            grid, weights, rows = gathered.average(tokens)
            rows, chosen = rows.unflatten(1, grid), (weights > 0).unflatten(1, grid)
            drawn = [sheet.place_sheet(*one) for one in runs.each(list(zip(rows, chosen, image, strict=True)))]
            return io.NodeOutput(torch.cat(drawn), ExecutionBlocker(None), maps.stretch(maps.resize(rows, size)))

        def before(step, evaluate):
            if gathered.grid is None:
                evaluate()  # shows which levels there are, so that only one of them has to be kept
                gathered.choose(tokens)

        look(model, conditioning, trajectory, every, receive, before)
        components, parts, cut = [], [], []
        for matrix in runs.each(gathered.average()):
            components.append(sheet.component_sheet(*self_maps.components(matrix, count, method), gathered.grid))
            labels = self_maps.clusters(matrix, clusters, seed)
            parts.append(sheet.cluster_sheet(labels, clusters, gathered.grid))
            cut.append(self_maps.label_masks(labels, clusters, gathered.grid, size))
        return io.NodeOutput(*(torch.cat(found) for found in (components, parts, cut)))


def _weights(point, mask, pictures, size):
    """What :class:`self_maps.PlaceSum` asks: of the tokens under a MASK, or of the one at a point (x, y) in 0..1."""
    if mask is None:

        def weights(grid):
            height, width = grid
            x, y = (min(int(share * n), n - 1) for share, n in zip(point, (width, height), strict=True))
            one = torch.zeros(height, width)
            one[y, x] = 1
            return one.flatten().expand(pictures, -1)

        return weights
    if len(mask) not in (1, pictures):
        raise ValueError(
            f"The mask holds {len(mask)} masks where the TRAJECTORY holds {pictures} "
            f"picture{'s' * (pictures > 1)}; give mask of Attune Self-Attention View one or as many."
        )
    check_painted(mask.flatten(1).any(1).all(), "mask", "Attune Self-Attention View", "what is to be looked from")
    return lambda grid: masks.touched(masks.fitted(mask, size), grid).expand(pictures, -1)


def _beside(image, pictures):
    """An IMAGE, or None, as one picture (H, W, 3) or None for each of a trajectory's pictures."""
    if image is None:
        return [None] * pictures
    if len(image) not in (1, pictures):
        raise ValueError(
            f"The image holds {len(image)} pictures where the TRAJECTORY holds {pictures}; give image of Attune "
            "Self-Attention View one or as many."
        )
    return list(schema.rgb(image).expand(pictures, -1, -1, -1))


class AttuneCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneCompare",
            display_name="Attune Compare",
            category="Attune/view",
            description=(
                "Puts two to four pictures side by side with captions, and beside them a picture of where they differ: "
                "black is the same, bright has changed."
            ),
            inputs=[
                io.Image.Input(
                    "image_1",
                    tooltip="What the others are compared to. A batch makes one row a picture.",
                ),
                io.Image.Input("image_2", tooltip="The second picture; one, or as many as the other inputs hold."),
                io.Image.Input("image_3", optional=True, tooltip="The third picture."),
                io.Image.Input("image_4", optional=True, tooltip="The fourth picture."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="source\nedit",
                    tooltip="One line of text a picture, in order.",
                ),
                io.Combo.Input(
                    "difference",
                    options=list(sheet.DIFFERENCES),
                    default=sheet.FIRST_AND_LAST,
                    tooltip="Which differences to show: the last picture to the first, each to the first, or none.",
                ),
                io.Float.Input(
                    "gain",
                    default=2.0,
                    min=0.1,
                    max=100.0,
                    step=0.5,
                    round=0.01,
                    tooltip="How much brighter differences are drawn than they are. Raise it to see small ones.",
                ),
                io.Int.Input(
                    "height", default=256, min=64, max=2048, step=8, tooltip="Height of a picture on the sheet."
                ),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="All pictures as one."),
                io.Image.Output(
                    "differences",
                    display_name="difference",
                    tooltip="The differences alone, as large as the first picture; nothing where none are asked for.",
                ),
            ],
        )
        return schema.searchable(node, "side by side", "before after", "diff", "difference picture", "compare images")

    @classmethod
    def execute(cls, image_1, image_2, captions, difference, gain, height, image_3=None, image_4=None):
        given = {f"image_{i}": b for i, b in enumerate((image_1, image_2, image_3, image_4), 1) if b is not None}
        rows = max(len(batch) for batch in given.values())
        for name, batch in given.items():
            if len(batch) not in (1, rows):
                raise ValueError(
                    f"{name} holds {len(batch)} pictures where another input holds {rows}; give every input of Attune "
                    "Compare one picture or as many as the others."
                )
        batches = [schema.rgb(batch) for batch in given.values()]
        lines = [[batch[i if len(batch) > 1 else 0] for batch in batches] for i in range(rows)]
        pictures, apart = sheet.compare_sheet(lines, captions.splitlines(), height, difference, gain, runs.each)
        return io.NodeOutput(pictures, ExecutionBlocker(None) if apart is None else apart)


class AttuneContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneContactSheet",
            display_name="Attune Contact Sheet",
            category="Attune/view",
            description="Puts pictures side by side with a line of text under each, to compare them at a glance.",
            inputs=[
                io.Image.Input("image_1", tooltip="The first picture; of a batch, every picture is shown."),
                io.Image.Input("image_2", optional=True, tooltip="The second picture."),
                io.Image.Input("image_3", optional=True, tooltip="The third picture."),
                io.Image.Input("image_4", optional=True, tooltip="The fourth picture."),
                io.Image.Input(
                    "wide",
                    optional=True,
                    tooltip="A picture to put below, across the whole width; of a batch, the first.",
                ),
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="source\nreconstruction\nedit",
                    tooltip="One line of text a picture, in order; the last may belong to the wide one.",
                ),
                io.Int.Input(
                    "height", default=256, min=64, max=2048, step=8, tooltip="Height of a picture on the sheet."
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="All pictures as one.")],
        )
        return schema.searchable(node, "compare", "grid", "side by side", "labels")

    @classmethod
    def execute(cls, image_1, labels, height, image_2=None, image_3=None, image_4=None, wide=None):
        pictures = [p for batch in (image_1, image_2, image_3, image_4) if batch is not None for p in schema.rgb(batch)]
        wide = None if wide is None else schema.rgb(wide)
        return io.NodeOutput(sheet.contact_sheet(pictures, labels.splitlines(), height, wide, runs.each))


NODES = [AttuneAttentionMaps, AttuneSelfAttentionView, AttuneCompare, AttuneContactSheet]
