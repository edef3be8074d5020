"""What edits are measured by: PIE-Bench's, MagicBrush's and the papers' figures, and success in the demo world.

Pictures are (3, H, W) tensors in 0..1 unless it is said otherwise. Where published numbers depend on a habit of the
code that made them, the habit is an option, and on as it was there. Networks come from the user's disk (networks.py);
where one is missing its columns say so and the others are measured.
"""

import functools

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from . import demo_edits
from .networks import CLIP_BASE, CLIP_LARGE, DINO_B8, DINO_S16, INCEPTION, SQUEEZENET, Missing, Networks, need

CEILING = 100.0  # dB that equal pictures get, whose PSNR has no end
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PACKAGES = "torch", "torchmetrics"
# Each column: the package or the network that it needs, and what it says.
BLACK = "the edited area black in both (PIE-Bench)"
COLUMNS = {
    "PSNR": ("torchmetrics", f"dB to the source, {BLACK}; higher is better"),
    "MSE": ("torch", f"mean squared error to the source, {BLACK}; lower is better"),
    "SSIM": ("torchmetrics", f"structural similarity to the source, {BLACK}; higher is better"),
    "LPIPS": (SQUEEZENET, f"perceptual distance on SqueezeNet to the source, {BLACK}; lower is better"),
    "PSNR kept": ("torchmetrics", "dB to the source over the pixels off the mask alone; higher is better"),
    "MSE kept": ("torch", "mean squared error to the source over the pixels off the mask alone; lower is better"),
    "SSIM kept": (
        "torchmetrics",
        "structural similarity to the source, its map averaged off the mask; higher is better",
    ),
    "LPIPS kept": (SQUEEZENET, "perceptual distance to the source, its map averaged off the mask; lower is better"),
    "structure distance": (DINO_B8, "how far DINO's self-similarity is from the source's; lower is better"),
    "CLIP score": (CLIP_LARGE, "100 times the cosine of picture and target caption, 0 and up; higher is better"),
    "CLIP score edited": (CLIP_LARGE, "CLIP score of the masked area, black around it; higher is better"),
    "CLIP direction": (CLIP_LARGE, "cosine of the picture's change and the captions' change; higher is better"),
    "L1": ("torch", "mean absolute error to the true edit; lower is better"),
    "L2": ("torch", "mean squared error to the true edit; lower is better"),
    "CLIP-I": (CLIP_BASE, "cosine with the true edit, by CLIP; higher is better"),
    "DINO": (DINO_S16, "cosine with the true edit, by DINO; higher is better"),
    "CLIP-T": (CLIP_BASE, "cosine with the true edit's caption, by CLIP; higher is better"),
}
# Of all pictures of a method together.
SETS = {
    "FID": (
        INCEPTION,
        "Frechet distance of a method's pictures to their sources by Inception's 2048 features; lower is better; "
        "some thousand pictures are needed before it means anything",
    ),
    "IS": (INCEPTION, "Inception score of a method's pictures, all of them in one split; higher is better"),
}


# ---- pictures ----------------------------------------------------------------------------------------------------


def open_picture(path, size=None):
    """A picture file as (3, H, W) in 0..1, resized to ``size`` (width, height), bicubically, if it has another."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    if size not in (None, picture.size):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255


def open_mask(path, size):
    """A mask file as (H, W) bool at ``size`` (width, height), True where it is white."""
    with Image.open(path) as picture:
        picture = picture.convert("L").resize(size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(picture)) >= 128


def zeroed(picture, kept):
    """The picture with everything off ``kept`` (H, W) bool black."""
    return picture * kept


# ---- distances to the source -------------------------------------------------------------------------------------
#
# PIE-Bench zeroes the edited area in both pictures and takes the mean over the whole picture, so that a larger mask
# makes smaller errors. With ``whole=False`` the mean goes over the kept pixels alone.


def mse(ours, theirs, kept=None, whole=True):
    """Mean squared error; ``kept`` (H, W) bool leaves the rest out of account."""
    if kept is None:
        return float(functional.mse_loss(ours, theirs))
    if whole:
        return float(functional.mse_loss(zeroed(ours, kept), zeroed(theirs, kept)))
    return float((ours - theirs)[:, kept].square().mean())


def psnr(ours, theirs, kept=None, whole=True):
    """Peak signal-to-noise ratio in dB for pictures of range 1, at most CEILING."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    if kept is not None:
        ours, theirs = (zeroed(p, kept) if whole else p[:, kept] for p in (ours, theirs))
    return min(CEILING, float(peak_signal_noise_ratio(ours, theirs, data_range=1.0)))


def ssim(ours, theirs, kept=None, whole=True):
    """Structural similarity (Wang et al. 2004; Gaussian windows of sigma 1.5, as torchmetrics has it), -1..1.

    Windows at the mask's edge see what lies beyond it, so over the kept pixels alone the edited area is black, too.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    # In float, equal pictures come out as 0.999995.
    ours, theirs = ((p if kept is None else zeroed(p, kept))[None].double() for p in (ours, theirs))
    mean, full = structural_similarity_index_measure(ours, theirs, data_range=1.0, return_full_image=True)
    return float(mean if kept is None or whole else full[0][:, kept].mean())


def lpips(network, ours, theirs, kept=None, whole=True):
    """Learned perceptual distance (Zhang et al. 2018), 0 and up; black is -1 to the network, as in the reference."""
    ours, theirs = ((p[None] if kept is None else zeroed(p, kept)[None]) * 2 - 1 for p in (ours, theirs))
    network.spatial = kept is not None and not whole
    found = network(ours, theirs)
    return float(found[0][:, kept].mean() if network.spatial else found)


def structure_distance(network, ours, source, peak=255.0, antialias=False, layer=11):
    """Mean squared difference of two pictures' self-similarity of keys (Tumanyan et al. 2022, Splicing ViT Features).

    ``peak`` is what white is before ImageNet's mean and deviation, made for 1, are applied: PIE-Bench leaves it at
    255. ``antialias`` says how the picture is made 224 pixels small; torchvision did it without at that time.
    """
    found = [_self_similarity(network, picture * peak, antialias, layer) for picture in (ours, source)]
    return float(functional.mse_loss(*found))


def _self_similarity(network, picture, antialias, layer):
    """(T, T) cosines of the keys of all heads of a layer, the class token among them."""
    keys = []
    hook = _key_layers(network)[layer].register_forward_hook(lambda module, given, out: keys.append(out[0]))
    try:
        network(_for_dino(picture, 224, antialias, max_size=480)[None], interpolate_pos_encoding=True)
    finally:
        hook.remove()
    keys = functional.normalize(keys[0], dim=-1, eps=1e-8)
    return keys @ keys.T


def _key_layers(network):
    """The layers that project keys, from the first on; releases of transformers call them differently."""
    return [layer for name, layer in network.named_modules() if name.endswith(("attention.key", "k_proj"))]


def _for_dino(picture, side, antialias=True, **how):
    """The picture with a short side of this many pixels, as numbers about 0."""
    from torchvision.transforms.v2.functional import normalize, resize

    return normalize(resize(picture, [side], antialias=antialias, **how), *map(list, IMAGENET))


# ---- captions and truths -----------------------------------------------------------------------------------------


def embed(model, processor, pictures, texts):
    """CLIP's embeddings, (P, D) and (N, D) of length 1, of P pictures and N texts; texts are cut after 77 tokens."""
    pixels = [(picture * 255).round().byte().cpu() for picture in pictures]
    cut = {"padding": True, "truncation": True, "max_length": model.config.text_config.max_position_embeddings}
    given = processor(text=list(texts), images=pixels, return_tensors="pt", **cut)
    found = model(**given.to(model.device))
    return found.image_embeds, found.text_embeds


def embed_by_dino(network, picture):
    """DINO's class token, (D,) of length 1, of the middle of a picture, as MagicBrush takes it."""
    from torchvision.transforms.v2.functional import InterpolationMode, center_crop

    small = _for_dino(picture, 256, interpolation=InterpolationMode.BICUBIC)
    return functional.normalize(network(center_crop(small, [224, 224])[None]).last_hidden_state[0, 0], dim=0)


def clip_score(picture, text, floor=True):
    """100 times the cosine of an embedded picture and an embedded text, (D,) of length 1 each; not below 0 with
    ``floor``, as Hessel et al. 2021 and torchmetrics have it."""
    score = 100 * float(picture @ text)
    return max(0.0, score) if floor else score


def clip_direction(source, picture, source_text, text):
    """The cosine of what changed between two embedded pictures and between two embedded texts (Gal et al. 2022), -1..1;
    None where one of them did not change."""
    seen, told = picture - source, text - source_text
    if min(float(seen.norm()), float(told.norm())) < 1e-6:
        return None
    return float(functional.cosine_similarity(seen, told, dim=0))


def l1(ours, truth):
    """Mean absolute error."""
    return float(functional.l1_loss(ours, truth))


def iou_curve(shares, true, thresholds):
    """(T,) intersection over union of ``shares`` (..., H, W) above each of T thresholds with masks ``true`` (..., H, W)
    bool, each mask's own and then their mean. Shares are divided by their greatest value; Dynamic Prompt Learning's
    evaluation does so and asks for strictly more than the threshold.
    """
    shares = shares / shares.amax((-2, -1), keepdim=True).clamp(min=1e-12)
    above = shares[None] > torch.as_tensor(thresholds).view(-1, *[1] * shares.ndim)
    both, either = (above & true).sum((-2, -1)), (above | true).sum((-2, -1))
    return (both / either.clamp(min=1)).flatten(1).mean(1)


# ---- sets of pictures --------------------------------------------------------------------------------------------


def frechet_distance(ours, theirs):
    """The Frechet distance of two Gaussians fitted to features (N, D) and (M, D), N and M at least 2 (Heusel et al.
    2017, FID): the squared distance of the means, and trace(A + B - 2 sqrt(A B)) of the covariances. 0 and up.

    A covariance of fewer pictures than features has no full rank; A B has real roots all the same, of which what
    rounding makes negative counts as 0.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"A Frechet distance needs two pictures on each side; {len(ours)} and {len(theirs)} came.")
    ours, theirs = ours.double(), theirs.double()
    a, b = torch.cov(ours.T).reshape(ours.shape[1], -1), torch.cov(theirs.T).reshape(ours.shape[1], -1)
    # A B has the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    apart = (ours.mean(0) - theirs.mean(0)).square().sum()
    return max(0.0, float(apart + a.trace() + b.trace() - 2 * shared))


def inception_score(logits):
    """exp of the mean divergence of each picture's class probabilities from those of all (Salimans et al. 2016), 1 and
    up, of logits (N, classes); all pictures are one split, since the sets here are small."""
    p = logits.double().softmax(1)
    mean = p.mean(0, keepdim=True)
    return float((p * (p.clamp(min=1e-30).log() - mean.clamp(min=1e-30).log())).sum(1).mean().exp())


# ---- the demo world ----------------------------------------------------------------------------------------------


def demo_success(sample, picture):
    """Whether a picture file shows the demo world's true edit (see :func:`demo_edits.shows`); None for other data."""
    if not {"before", "after"} <= set(sample.extras):
        return None
    before, after = (demo_edits.scene_of(sample.extras[part]) for part in ("before", "after"))
    return demo_edits.shows(sample.kind, before, after, open_picture(picture).movedim(0, -1).numpy())


# ---- all of them -------------------------------------------------------------------------------------------------


class Metrics:
    """The figures of edits. ``networks`` is a folder of networks (a Path) or None.

    ``columns`` are the names and what each says, ``names`` the names alone. ``why_not`` gives for each column that
    cannot be had on this machine the reason, one sentence; :meth:`measure` leaves those out.
    """

    columns = {name: says for name, (_, says) in COLUMNS.items()}
    names = tuple(columns)
    sets = tuple(SETS)

    def __init__(self, networks=None):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.networks = Networks(networks, self.device)
        self.why_not = {}
        for name, (needed, _) in (COLUMNS | SETS).items():
            try:
                (need if needed in PACKAGES else self.networks.find)(needed)
            except Missing as reason:
                self.why_not[name] = str(reason)

    @torch.inference_mode()
    def measure(self, sample, picture):
        """The figures of an edited picture file: name -> float, or None where the sample has no such thing: no mask,
        one that covers everything (PIE-Bench's "nan"), no source caption, no true edit.

        A picture of another size is brought to the source's, and for the figures beside a true edit to that one's.
        """
        figures = self._beside_source(sample, picture) | self._beside_text(sample, picture)
        figures |= self._beside_truth(sample, picture)
        wanted = {name: figures.get(name) for name in self.names if name not in self.why_not}
        return {name: None if figure is None else figure() for name, figure in wanted.items()}

    @torch.inference_mode()
    def measure_set(self, pairs):
        """The figures of a method's whole set, of (source file or None, picture file) pairs: name -> float, or None
        where there are fewer than two pictures or a source is lacking. What cannot be had is left out."""
        names = [name for name in self.sets if name not in self.why_not]
        if not names:
            return {}
        features, logits = self._seen(picture for _, picture in pairs)
        figures = {"FID": None, "IS": None}
        if len(pairs) > 1:
            figures["IS"] = inception_score(logits)
            if all(source for source, _ in pairs):
                figures["FID"] = frechet_distance(features, self._seen(source for source, _ in pairs)[0])
        return {name: figures[name] for name in names}

    def _seen(self, paths):
        """Inception's features (N, 2048) and logits (N, 1008) of N picture files."""
        found = []
        for path in paths:
            pixels = (open_picture(path)[None] * 255).round().byte().to(self.device)
            found.append([out.cpu() for out in self.networks.inception(pixels)])
        return [torch.cat(part) for part in zip(*found, strict=True)] if found else (None, None)

    def _beside_source(self, sample, picture):
        """Name -> a function that measures, of the columns that this sample has; so the next two."""
        source, ours, size = self._open(sample.picture, picture)
        figures = {"structure distance": lambda: structure_distance(self.networks.dino(DINO_B8), ours, source)}
        kept = None if sample.mask is None else ~open_mask(sample.mask, size).to(self.device)
        if kept is None or not kept.any():
            return figures
        for suffix, whole in (("", True), (" kept", False)):
            how = ours, source, kept, whole
            figures |= {
                f"PSNR{suffix}": functools.partial(psnr, *how),
                f"MSE{suffix}": functools.partial(mse, *how),
                f"SSIM{suffix}": functools.partial(ssim, *how),
                f"LPIPS{suffix}": lambda how=how: lpips(self.networks.squeezenet, *how),
            }
        return figures

    def _beside_text(self, sample, picture):
        def look(*pictures, texts=(sample.target,)):
            return embed(*self.networks.clip(CLIP_LARGE), pictures, texts)

        source, ours, size = self._open(sample.picture, picture)
        figures = {"CLIP score": lambda: clip_score(*(e[0] for e in look(ours)))}
        mask = None if sample.mask is None else open_mask(sample.mask, size).to(self.device)
        if mask is not None and mask.any():
            figures["CLIP score edited"] = lambda: clip_score(*(e[0] for e in look(zeroed(ours, mask))))
        if sample.source and sample.source != sample.target:

            def direction():
                (before, after), texts = look(source, ours, texts=(sample.source, sample.target))
                return clip_direction(before, after, *texts)

            figures["CLIP direction"] = direction
        return figures

    def _beside_truth(self, sample, picture):
        def alike(network, *pictures):
            one, other = (embed_by_dino(network, p) for p in pictures)
            return float(one @ other)

        caption = sample.extras.get("local caption", sample.target)  # MagicBrush measures CLIP-T by local captions
        ours, clip = self._open(picture, picture)[0], lambda *given: embed(*self.networks.clip(CLIP_BASE), *given)
        figures = {"CLIP-T": lambda: clip_score(*(e[0] for e in clip([ours], [caption])), floor=False) / 100}
        if sample.truth is None:
            return figures
        truth, sized, _ = self._open(sample.truth, picture)

        def clip_i():
            one, other = clip([ours, truth], [""])[0]
            return float(one @ other)

        return figures | {
            "L1": lambda: l1(sized, truth),
            "L2": lambda: mse(sized, truth),
            "CLIP-I": clip_i,
            "DINO": lambda: alike(self.networks.dino(DINO_S16), ours, truth),
        }

    def _open(self, path, picture):
        """The picture at ``path``, the other brought to its size, and that size (width, height)."""
        first = open_picture(path)
        size = first.shape[2], first.shape[1]
        return first.to(self.device), open_picture(picture, size).to(self.device), size
