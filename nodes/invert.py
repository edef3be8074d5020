"""From a picture to a trajectory."""

from comfy_api.latest import io

from ..attention_patches.host import check_plain
from ..inversion import ddim, host
from ..inversion.trajectory import Trajectory
from . import schema

GRIDS = [host.HOST_GRID, host.PAPERS_GRID]
LEVELS = [ddim.LATER, ddim.CURRENT]


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
                io.Sigmas.Output(
                    "sigmas",
                    display_name="sigmas",
                    tooltip="The way back, for Sampler Custom. Use it with euler.",
                ),
            ],
        )
        return schema.searchable(node, "ddim inversion", "invert", "real image editing", "image to noise", "unsample")

    @classmethod
    def execute(cls, model, latent, conditioning, steps, grid, epsilon):
        schema.check_choice(grid, GRIDS, "The grid", "Attune DDIM Inversion")
        schema.check_choice(epsilon, LEVELS, "Epsilon", "Attune DDIM Inversion")
        check_plain(model)
        picture = latent["samples"]
        host.check_latent(model, picture)
        sigmas = host.schedule(model, steps, grid)
        lowest = host.lowest_sigma(model)

        def body(denoise, start, report):
            return ddim.invert(denoise, start, sigmas, epsilon, lowest, report)

        path = host.walk(model, conditioning, picture, sigmas, body).cpu()
        header = {**host.describe_model(model), "method": "ddim", "grid": grid, "epsilon": epsilon}
        # The papers' own grid has a last step onto itself, which is left out of the walk but counts.
        counted = len(sigmas) if grid == host.PAPERS_GRID else len(sigmas) - 1
        trajectory = Trajectory(sigmas, path, counted, header)
        noise = {**latent, "samples": host.to_host_scale(model, trajectory.noise)}
        # A mask in the latent would keep the sampler from drawing there, on the way back too.
        noise.pop("noise_mask", None)
        return io.NodeOutput(trajectory, noise, sigmas)


NODES = [AttuneDDIMInversion]
