"""A trajectory: a finished deterministic run, kept as a plain value. Knows nothing of attention. torch only."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, eq=False)
class Trajectory:
    """``sigmas`` (S+1,) run from noise to picture; ``latents`` (S+1, B, C, h, w) are fp32 on the CPU, in the model's
    own scale (the host's latent times the format's factor), where x = x0 + sigma * eps.

    ``steps`` is the number of steps as the method's paper counts them: S, or S + 1 on a grid that ends in a step onto
    itself. ``header`` says what made it: model (see :func:`host.describe_model`), method, options.
    """

    sigmas: torch.Tensor
    latents: torch.Tensor
    steps: int
    header: dict = field(default_factory=dict)

    @property
    def noise(self):
        return self.latents[0]


def check_same_model(trajectory, header):
    """Raises ValueError when a trajectory was made with another model than ``header`` describes."""
    for key, what in (
        ("family", "model family"),
        ("latent_format", "latent format"),
        ("prediction", "prediction type"),
    ):
        if trajectory.header[key] != header[key]:
            raise ValueError(
                f"The TRAJECTORY was made with {what} {trajectory.header[key]}, but the MODEL is {header[key]}; "
                "invert the picture again with the MODEL that is connected here, or connect the one it was made with."
            )
    ours, theirs = torch.tensor(trajectory.header["weights"]), torch.tensor(header["weights"])
    # Loose enough for one checkpoint in two precisions, tight enough to tell two checkpoints apart.
    if not torch.allclose(ours, theirs, rtol=0.02, atol=1e-3):
        raise ValueError(
            "The TRAJECTORY was made with another checkpoint than the MODEL's; invert the picture again with the MODEL "
            "that is connected here, or connect the one it was made with."
        )
