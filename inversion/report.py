"""How well a trajectory brings its picture back, and what to do where it does not. Plain values and torch."""

from dataclasses import dataclass

import torch
from kornia.metrics import ssim

GOOD = 1.5  # dB below the autoencoder's own picture that no eye would notice
POOR_CEILING = 24.0  # dB; below it the autoencoder itself loses what the picture is about


@dataclass(frozen=True, eq=False)
class Row:
    """One way of getting the picture back: its ``name``, pictures (B, H, W, 3) in 0..1, and where it was drawn step by
    step, the ``drift`` (S+1,) from the trajectory (see :func:`drift_of`)."""

    name: str
    pictures: torch.Tensor
    drift: torch.Tensor | None = None


def fit(image, pictures, node="Attune Inversion Report"):
    """An IMAGE (B, H, W, C) cut about its middle to the size of ``pictures``, as VAEs do that want multiples of 8.

    Raises ValueError when it cannot be the picture they come from.
    """
    (ours, *size), (theirs, *wanted) = image.shape[:3], pictures.shape[:3]
    spare = [have - want for have, want in zip(size, wanted, strict=True)]
    if not all(0 <= s < 64 for s in spare) or ours not in (1, theirs):
        raise ValueError(
            f"The IMAGE holds {ours} pictures of {size[1]}x{size[0]}, but the TRAJECTORY {theirs} of "
            f"{wanted[1]}x{wanted[0]}; connect the image that was inverted to {node}."
        )
    top, left = spare[0] // 2, spare[1] // 2
    return image[:, top : top + wanted[0], left : left + wanted[1], :3].expand(theirs, -1, -1, -1)


def decibels(error):
    """Mean over pictures of the peak signal-to-noise ratio in dB, for (B, ...) squared errors in 0..1 units."""
    return float((-10 * torch.log10(error.flatten(1).mean(1).clamp(min=1e-10))).mean())


def psnr(ours, true):
    """The same for (B, H, W, C) pictures in 0..1."""
    return decibels((ours - true).square())


def structural_similarity(ours, true):
    """Mean SSIM (Wang et al. 2004, windows of 11) for (B, H, W, C) in 0..1; -1..1, 1 for equal pictures."""
    return float(ssim(ours.movedim(-1, 1).float(), true.movedim(-1, 1).float(), 11).mean())


def drift_of(path, trajectory):
    """(S+1,) root of the mean squared distance of ``path`` (S+1, B, C, h, w) from the trajectory's latents, as a share
    of those latents' own size at each step."""
    latents = trajectory.latents
    size = latents.square().mean((1, 2, 3, 4)).sqrt()
    return (path.cpu() - latents).square().mean((1, 2, 3, 4)).sqrt() / size.clamp(min=1e-6)


def table(ceiling, rows, true):
    """Markdown: for each row PSNR, its distance from the ceiling, SSIM, and the error of the last latent."""
    lines = ["| picture | PSNR dB | below the VAE | SSIM | latent error |", "|---|---|---|---|---|"]
    best = psnr(ceiling.pictures, true)
    for row in (ceiling, *rows):
        value = psnr(row.pictures, true)
        error = "" if row.drift is None else f"{100 * float(row.drift[-1]):.1f} %"
        below = "" if row is ceiling else f"{round(best - value, 1) + 0.0:.1f}"
        lines.append(
            f"| {row.name} | {value:.1f} | {below} | {structural_similarity(row.pictures, true):.3f} | {error} |"
        )
    return "\n".join(lines)


def verdict(ceiling, plain, guided, guidance, learned, true):
    """What the user can do, in a few sentences. ``plain`` and ``guided`` are rows, ``learned`` says whether the
    trajectory holds null embeddings."""
    best, alone, led = (psnr(row.pictures, true) for row in (ceiling, plain, guided))
    said = []
    if best < POOR_CEILING:
        said.append(
            f"The VAE cannot hold this detail: encoding and decoding alone leaves {best:.1f} dB. Use a larger picture "
            "or another VAE; no inversion gets past it."
        )
    if best - led <= GOOD:
        said.append(f"At guidance {guidance:g} the picture comes back as well as the VAE lets it.")
        return " ".join(said)
    step = leaves(guided.drift)
    said.append(
        f"At guidance {guidance:g} it drifts from step {step} of {len(guided.drift) - 1} on and ends "
        f"{best - led:.1f} dB below the VAE."
    )
    if learned:
        said.append(
            "More inner steps, a higher learning rate, or learning at this very guidance would bring it closer."
        )
    elif alone - led > GOOD / 3:  # else guidance is not what drives it off
        said.append("Use null-text inversion, or an edit with a pinned source, which every Attune edit has.")
    if best - alone > GOOD:
        said.append(
            f"Without guidance {best - alone:.1f} dB are lost already: more steps, a refinement or two in Attune DDIM "
            "Inversion, or a caption that is closer to the picture would help."
        )
    return " ".join(said)


def leaves(drift, bound=0.05):
    """The first step at whose end the drift is above ``bound`` and stays there; the worst one if it never is."""
    above = (drift > bound).tolist()
    if not above[-1]:
        return max(1, int(drift.argmax()))
    last_inside = max((i for i, out in enumerate(above) if not out), default=0)
    return min(last_inside + 1, len(above) - 1)
