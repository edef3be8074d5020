"""MaSaFusion as its paper describes it, on diffusers (Li et al., "Enhancing Text-to-Image Editing via Hybrid
Mask-Informed Fusion"): with an adapter (section 4, algorithm 1) and without (appendix C, algorithm 5); and EmbCtrl's
text (appendix B). No code of its authors is known.

Every prediction is a pass of its own, row by row, with every attention map written out as probabilities. Written apart
from Attune's own edits, which it is there to check; it shares with the pack text embeddings, noise and weights only.

Shapes: T text columns, H heads, N picture tokens, D a head's width, S steps. All on the CPU, fp32, in diffusers'
coordinates. Self-attention layers are counted from 0 in the order in which the UNet runs them, and so are
cross-attention layers.
"""

from dataclasses import dataclass

import torch
from diffusers import T2IAdapter

from . import reference

KEYS, MAP = "keys and values", "map"  # what a part reads of a run


# ---- attention by rules ------------------------------------------------------------------------------------------


class Plain:
    """Attention as it is. The two methods get one row's q, k and v (H, N, D), with T for N in the cross-attention's k
    and v, and return what the layer puts out, (H, N, D)."""

    def self_attention(self, layer, q, k, v, scale):
        return attend(q, k, v, scale)

    def cross_attention(self, layer, q, k, v, scale):
        return attend(q, k, v, scale)


class Remember(Plain):
    """Plain, and keeps (q, k, v) of every self-attention layer, and (k, v) of every cross-attention layer."""

    def __init__(self):
        self.own, self.text = [], []

    def self_attention(self, layer, q, k, v, scale):
        self.own.append((q, k, v))
        return attend(q, k, v, scale)

    def cross_attention(self, layer, q, k, v, scale):
        self.text.append((k, v))
        return attend(q, k, v, scale)


@dataclass(frozen=True, eq=False)
class Read(Plain):
    """From self-attention ``layer`` on ``what`` is taken of another run that was remembered: its KEYS and values
    (equation 9), or its MAP, that is its queries and keys (equation 10)."""

    of: Remember
    what: str
    layer: int

    def self_attention(self, layer, q, k, v, scale):
        if layer < self.layer:
            return attend(q, k, v, scale)
        theirs = self.of.own[layer]
        return attend(q, *theirs[1:], scale) if self.what == KEYS else attend(*theirs[:2], v, scale)


def attend(q, k, v, scale):
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


class _Attention:
    """A diffusers attention processor for one row, which asks a rule; it counts the layers of each kind."""

    def __init__(self, rule):
        self.rule, self.layers = rule, {"self": 0, "cross": 0}

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        kind = "self" if encoder_hidden_states is None else "cross"
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (attn.head_to_batch_dim(x) for x in projected)
        out = getattr(self.rule, f"{kind}_attention")(self.layers[kind], q, k, v, attn.scale)
        self.layers[kind] += 1
        return attn.to_out[0](attn.batch_to_head_dim(out))


@torch.no_grad()
def predict(unet, z, t, text, rule, residuals=None):
    """The noise (1, 4, h, w) that is predicted in z at timestep t under a ``text`` (1, T, width), attention following
    ``rule``; ``residuals`` are an adapter's, as :func:`features` gives them."""
    before, one = unet.attn_processors, _Attention(rule)
    unet.set_attn_processor(dict.fromkeys(before, one))
    given = residuals and list(residuals)  # the UNet takes them off the list
    try:
        return unet(z, t, encoder_hidden_states=text, down_intrablock_additional_residuals=given).sample
    finally:
        unet.set_attn_processor(before)


# ---- the adapter -------------------------------------------------------------------------------------------------


def adapter(weights, channels):
    """Diffusers' T2IAdapter for hints of one channel, ``channels`` wide at its four levels, with the tensors of a file
    in the layout of its authors ("body.3.block1.weight"). Raises RuntimeError for tensors that do not fit."""
    net = T2IAdapter(in_channels=1, channels=list(channels), num_res_blocks=2, downscale_factor=8)
    named = {}
    for name, tensor in weights.items():
        if name.startswith("body."):
            _, number, rest = name.split(".", 2)
            level, block = divmod(int(number), 2)
            rest = rest if rest.startswith("in_conv") else f"resnets.{block}.{rest}"
            name = f"body.{level}.{rest}"
        named[f"adapter.{name}"] = tensor.float()
    net.load_state_dict(named)
    return net.eval().requires_grad_(False)


@torch.no_grad()
def features(net, hint, widths):
    """What a T2I-Adapter adds at each level of a UNet of ``widths``, for a ``hint`` (1, 1, H, W) in 0..1.

    Where the adapter is twice as wide, as SD's are beside the demo model, channels are added up in pairs.
    """
    found = net(hint)
    return [f if f.shape[1] == w else f.unflatten(1, (w, 2)).sum(2) for f, w in zip(found, widths, strict=True)]


# ---- MaSaFusion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is read: ``latents``, S + 1 tensors (1, 4, h, w) from noise to picture, made under ``text`` and
    ``nulls`` (1, T, width), of which there is one or one a step, and under an adapter's ``residuals``."""

    latents: list
    text: torch.Tensor
    nulls: list
    residuals: list | None = None

    def remember(self, unet, step, t):
        """Of both halves of guidance, the null's first, what their self-attention held at a step."""
        null = self.nulls[step if len(self.nulls) > 1 else 0]
        halves = Remember(), Remember()
        for text, half in zip((null, self.text), halves, strict=True):
            predict(unet, self.latents[step], t, text, half, self.residuals)
        return halves


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the picture: drawn under ``text``, reading ``what`` (KEYS or MAP) of ``run``, or nothing."""

    text: torch.Tensor
    run: Run | None = None
    what: str = KEYS


@dataclass(frozen=True)
class Settings:
    """``steps`` of DDIM on the grid ``kind``; other runs are read from step ``first`` to before ``last``, from
    self-attention ``layer`` on."""

    kind: str
    steps: int
    guidance: float
    first: int
    last: int
    layer: int


@torch.no_grad()
def fuse(unet, settings, noise, null, region, outside, inside, residuals=None):
    """Draws from ``noise`` (1, 4, h, w): where ``region`` (h, w) is True the :class:`Part` ``inside`` predicts the
    noise, elsewhere the part ``outside``, each for itself under guidance, against ``null`` (1, T, width); all under an
    adapter's ``residuals``.

    With the source's KEYS outside and nothing inside this is equation 9, the intermediate picture; with the source's
    KEYS outside and the intermediate's MAP inside equation 10, the target; with the source's KEYS in both it is
    appendix C, and with a region that is all of the picture equation 13.

    Returns (S + 1 latents from noise to picture; the S mixed predictions).
    """
    ddim = reference.scheduler(settings.kind, settings.steps)
    latents, mixed = [noise], []
    for step, t in enumerate(ddim.timesteps.tolist()):
        z, found = latents[-1], []
        for part in (outside, inside):
            rules = Plain(), Plain()
            if part.run is not None and settings.first <= step < settings.last:
                rules = [Read(half, part.what, settings.layer) for half in part.run.remember(unet, step, t)]
            empty, clean = (
                predict(unet, z, t, text, rule, residuals) for text, rule in zip((null, part.text), rules, strict=True)
            )
            found.append(empty + settings.guidance * (clean - empty))
        mixed.append(torch.where(region, found[1], found[0]))
        latents.append(ddim.step(mixed[-1], t, z).prev_sample)
    return latents, mixed


# ---- EmbCtrl -----------------------------------------------------------------------------------------------------


def control(source, target, columns):
    """The source's embedding (1, T, width) with the target's at ``columns``, those of the changed words (eq. 12)."""
    mixed = source.clone()
    mixed[:, columns] = target[:, columns]
    return mixed
