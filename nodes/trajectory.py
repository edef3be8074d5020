"""What to do with a trajectory: keep it in a file, start part of the way down, see how well it holds."""

import math

from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..attention_patches.host import check_plain, check_texts
from ..inversion import file as files
from ..inversion import host, report
from ..inversion.trajectory import check_whole, negative_of
from ..messages import legible
from . import schema, sheet
from .edit import check_model

NO_NULLS = (
    "The TRAJECTORY holds no negative, but something is connected to the negative of Attune Trajectory Conditioning; "
    "connect an empty CLIP Text Encode there, or make the trajectory with Attune Null-Text Inversion."
)


class AttuneSaveTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneSaveTrajectory",
            display_name="Attune Save Trajectory",
            category="Attune/invert",
            description=(
                "Writes a trajectory, with what was learned on it, to one safetensors file in ComfyUI's output folder, "
                "so that a picture is inverted only once."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="What to save, from any Attune inversion."),
                io.String.Input(
                    "filename_prefix",
                    default="attune/trajectory",
                    tooltip="Folder and beginning of the name; a number follows, so nothing is overwritten.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "file", display_name="file", tooltip="The file's name, as Attune Load Trajectory lists it."
                )
            ],
            is_output_node=True,
        )
        return schema.searchable(node, "save inversion", "export latents", "safetensors")

    @classmethod
    def execute(cls, trajectory, filename_prefix):
        name = host.save_trajectory(filename_prefix, files.packed(trajectory, host.versions()))
        return io.NodeOutput(name + host.OUTPUT, ui={"text": (f"saved as {name}",)})


class AttuneLoadTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneLoadTrajectory",
            display_name="Attune Load Trajectory",
            category="Attune/invert",
            description=(
                "Reads a trajectory that was saved. It fits the checkpoint it was made with; other nodes say so where "
                "it does not."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.trajectory_files(),
                    tooltip=(
                        "A file that ends in .trajectory.safetensors in ComfyUI's input or output folder. Press R to "
                        "refresh the list."
                    ),
                )
            ],
            outputs=[
                schema.Trajectory.Output(
                    "trajectory", display_name="trajectory", tooltip="The way that was saved, for Attune's nodes."
                ),
                io.String.Output("prompt", display_name="prompt", tooltip="The caption that it was made with."),
            ],
        )
        return schema.searchable(node, "load inversion", "import latents", "safetensors")

    @classmethod
    def validate_inputs(cls, file, input_types=None):
        # Naming the types takes it on this node which links ComfyUI lets through: it has no list of choices for texts.
        kind = (input_types or {}).get("file", "STRING")
        if kind not in ("STRING", "COMBO", "*"):
            return f"The file comes from a {kind}, but must be a name; link a STRING to file of Attune Load Trajectory."
        if file is None:  # linked, and not known before it runs
            return True
        try:
            host.trajectory_path(file)
        except ValueError as problem:
            return legible(str(problem))
        return True

    @classmethod
    def fingerprint_inputs(cls, file):
        # Nobody knows yet what a linked name will be, so its file is read each time: NaN is never what it was.
        return math.nan if file is None else host.content_key(host.trajectory_path(file))

    @classmethod
    def execute(cls, file):
        trajectory = files.load(host.trajectory_path(file))
        return io.NodeOutput(trajectory, trajectory.header.get("prompt") or "")


class AttuneTrajectoryLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneTrajectoryLatent",
            display_name="Attune Trajectory Latent",
            category="Attune/invert",
            description=(
                "The latent of a trajectory part of the way down and the noise levels that remain, so that an edit "
                "starts there: image to image, from exactly this picture's noise in the place of a random one."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="The way to start on, from an Attune inversion."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "Share of the steps that remain: 1 starts at the noise and changes most, 0.5 half way down, "
                        "0 is the finished picture."
                    ),
                ),
                io.Int.Input(
                    "step",
                    default=-1,
                    min=-1,
                    max=1000,
                    tooltip="A step by its number, 0 for the noise, in place of strength; -1 leaves it to strength.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="latent", tooltip="Start the sampler here, with adding noise switched off."
                ),
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="The noise levels that remain."),
            ],
        )
        return schema.searchable(node, "sdedit", "img2img", "partial denoise", "start step", "split sigmas")

    @classmethod
    def execute(cls, trajectory, strength, step):
        moves = len(trajectory.sigmas) - 1
        if step > moves:
            raise ValueError(
                f"The step is {step}, but the TRAJECTORY has {moves}; choose one from 0 to {moves} in Attune "
                "Trajectory Latent."
            )
        first = step if step >= 0 else moves - round(strength * moves)
        return io.NodeOutput({"samples": host.host_latent(trajectory, first)}, trajectory.sigmas[first:])


class AttuneTrajectoryConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneTrajectoryConditioning",
            display_name="Attune Trajectory Conditioning",
            category="Attune/invert",
            description="What a trajectory was made under, for a sampler: its text, and the null embeddings it holds.",
            inputs=[schema.Trajectory.Input("trajectory", tooltip="Most useful after Attune Load Trajectory.")],
            outputs=[
                io.Conditioning.Output(
                    "positive", display_name="positive", tooltip="The text that the trajectory was made under."
                ),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="Its null embeddings, one a step, or the negative it was made with.",
                ),
            ],
        )
        return schema.searchable(node, "null embeddings", "conditioning of trajectory")

    @classmethod
    def execute(cls, trajectory):
        check_whole(trajectory, "Attune Trajectory Conditioning")
        return io.NodeOutput(trajectory.conditioning, negative_of(trajectory) or ExecutionBlocker(NO_NULLS))


class AttuneInversionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneInversionReport",
            display_name="Attune Inversion Report",
            category="Attune/invert",
            description=(
                "Draws a trajectory again without guidance and with yours, measures how well the picture comes back "
                "beside what the VAE alone can hold, and says what to do where it does not."
            ),
            inputs=[
                schema.Trajectory.Input("trajectory", tooltip="What to examine, from any Attune inversion."),
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.Image.Input("image", tooltip="The picture that was inverted."),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    round=0.01,
                    tooltip="The guidance (cfg) that you will draw the edit with.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Your sampler's negative. Not needed where the trajectory holds null embeddings.",
                ),
            ],
            outputs=[
                io.String.Output("verdict", display_name="verdict", tooltip="What the figures mean for you."),
                io.String.Output("table", display_name="table", tooltip="PSNR, SSIM and latent error, as Markdown."),
                io.Image.Output(
                    "sheet", display_name="sheet", tooltip="The pictures side by side, and the drift step by step."
                ),
            ],
            is_output_node=True,
        )
        return schema.searchable(node, "reconstruction quality", "psnr", "ssim", "evaluate inversion")

    @classmethod
    def execute(cls, trajectory, model, vae, image, guidance, negative=None):
        check_plain(model)
        check_model(model, trajectory, schema.node_id(cls))
        check_whole(trajectory, "Attune Inversion Report")
        learned = trajectory.nulls is not None
        negative = negative_of(trajectory) if learned or negative is None else negative
        if guidance != 1 and not negative:
            raise ValueError(
                f"The guidance is {guidance:g}, but the TRAJECTORY holds no negative; connect your sampler's "
                "negative to Attune Inversion Report."
            )
        check_texts(model, negative or [])
        rows = []
        pinned = report.Row("pinned source", host.decode(vae, trajectory, trajectory.latents[-1]))
        for name, scale in (("guidance 1", 1.0), (f"guidance {guidance:g}", guidance)):
            path = host.check_path(host.draw_again(model, trajectory, negative, scale), "Attune Inversion Report")
            rows.append(report.Row(name, host.decode(vae, trajectory, path[-1]), report.drift_of(path, trajectory)))
        true = report.fit(schema.rgb(image), pinned.pictures)
        ceiling = report.Row("VAE alone", vae.decode(vae.encode(true)))
        table = report.table(ceiling, (*rows, pinned), true)
        verdict = report.verdict(ceiling, *rows, guidance, learned, true)
        names = ("picture", ceiling.name, rows[0].name, rows[1].name)
        shown = [p[0] for p in (true, ceiling.pictures, *(row.pictures for row in rows))]
        pictures = sheet.report_sheet(shown, names, {row.name: row.drift.tolist() for row in rows})
        return io.NodeOutput(verdict, table, pictures, ui={"text": (f"{verdict}\n\n{table}",)})


NODES = [
    AttuneSaveTrajectory,
    AttuneLoadTrajectory,
    AttuneTrajectoryLatent,
    AttuneTrajectoryConditioning,
    AttuneInversionReport,
]
