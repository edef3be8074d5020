"""Seeing: attention maps and pictures side by side."""

from comfy_api.latest import io

from ..attention_patches import host, maps
from ..inversion import host as runs
from ..inversion.trajectory import check_same_model
from . import schema, sheet


class AttuneAttentionMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneAttentionMaps",
            display_name="Attune Attention Maps",
            category="Attune/view",
            description=(
                "Shows where each word of a prompt looks in a picture: its cross-attention, averaged over the steps of "
                "a trajectory, as one labelled picture."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                schema.Trajectory.Input("trajectory", tooltip="The picture to look into, from an Attune inversion."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="a red circle on a gray background",
                    tooltip="The words to look for. Words that the picture does not show still get a map.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Which words to show, with commas between; empty shows every word of the prompt.",
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
                    tooltip="Looks at every n-th step only. Lower is slower and hardly changes the maps.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "maps", display_name="maps", tooltip="One map a word, brightest where the word looks most."
                )
            ],
        )
        return schema.searchable(node, "cross-attention map", "heat map", "daam", "token map", "visualize attention")

    @classmethod
    def execute(cls, model, clip, trajectory, prompt, words, tokens, every):
        host.check_plain(model)
        check_same_model(trajectory, runs.describe_model(model))
        read = host.read_words(clip, prompt)
        chosen = [w.strip() for w in words.split(",") if w.strip()]
        shown = [(w, p) for w in chosen for p in read.find(w)] or [(w.text, w.positions) for w in read.words]
        if not shown:
            raise ValueError("The prompt is empty, but a map belongs to a word; write one in Attune Attention Maps.")
        gathered = maps.MapSum()

        def receive(place, own, heads):
            if place.kind == "cross":
                gathered.add(place, own, heads)

        def body(denoise, start, report):
            for i in range(0, len(trajectory.sigmas) - 1, every):
                x = trajectory.latents[i].to(start)
                report(i, denoise(x, float(trajectory.sigmas[i])), x)

        picture = runs.to_host_scale(model, trajectory.latents[-1])
        runs.walk(host.recording(model, receive), host.encode(clip, prompt), picture, trajectory.sigmas, body)
        level = gathered.nearest(tokens)
        pictures = [maps.stretch(maps.word_map(level, positions)) for _, positions in shown]
        return io.NodeOutput(sheet.map_sheet(pictures, [word for word, _ in shown]))


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
        pictures = [p for batch in (image_1, image_2, image_3, image_4) if batch is not None for p in batch]
        if not pictures:
            raise ValueError("The images are empty batches; connect at least one picture to Attune Contact Sheet.")
        return io.NodeOutput(sheet.contact_sheet(pictures, labels.splitlines(), height, wide))


NODES = [AttuneAttentionMaps, AttuneContactSheet]
