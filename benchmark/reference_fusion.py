"""MaSaFusion as its paper's page has it, on diffusers, equation by equation and algorithm by algorithm (Li et al.,
"Enhancing Text-to-Image Editing via Hybrid Mask-Informed Fusion"): with an adapter (section 4, algorithm 1) and without
(appendix C, algorithm 5), over either inversion (appendix A, algorithms 2 and 3); and EmbCtrl's text (appendix B). No
code of its authors is known.

Every prediction is a pass of its own, row by row, with every attention map written out as probabilities. Written apart
from Attune's own edits, which it is there to check; it shares with the pack text embeddings, noise and weights only.

Shapes: T text columns, H heads, N picture tokens, D a head's width, S steps. All on the CPU, fp32, in diffusers'
coordinates. Self-attention layers are counted from 0 in the order in which the UNet runs them, and so are
cross-attention layers. Names follow the page: x^S the source, x^t2i the intermediate, x^T the target, A the region.
"""

from dataclasses import dataclass

import torch
from diffusers import T2IAdapter

from . import reference

SOURCES, OWN = "source's", "own"  # whose queries attend outside A: what equation 9 prints, and the other reading


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


def bar(own, source):
    """Equation 9, epsilon-bar: Attention_SA(Q^T, K^T, V^T) becomes Attention_SA(Q^S, K^S, V^S)."""
    return source


def bar_own(own, source):
    """The other reading of equation 9: the queries stay the row's own."""
    return own[0], source[1], source[2]


def hat(own, t2i):
    """Equation 10, epsilon-hat: Attention_SA(Q^T, K^T, V^T) becomes Attention_SA(Q^t2i, K^t2i, V^T)."""
    return t2i[0], t2i[1], own[2]


def hat_without_t2i(own, source):
    """Equation 13, epsilon-hat w/o t2i: Attention_SA(Q^T, K^T, V^T) becomes Attention_SA(Q^T, K^S, V^S)."""
    return own[0], source[1], source[2]


@dataclass(frozen=True, eq=False)
class Substitute(Plain):
    """From self-attention ``layer`` on, ``how`` says with what of its own and of the ``cached`` a row attends."""

    cached: Remember
    how: object
    layer: int

    def self_attention(self, layer, q, k, v, scale):
        own = q, k, v
        return attend(*(own if layer < self.layer else self.how(own, self.cached.own[layer])), scale)


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


# ---- equations 3 and 4, and the two inversions -------------------------------------------------------------------


PLAIN = Plain(), Plain()


def guided(unet, z, t, text, null, w, rules=PLAIN, residuals=(None, None)):
    """Equation 3: w eps(C) + (1 - w) eps(null). ``rules`` and ``residuals`` are the null's, then the text's."""
    away, here = (predict(unet, z, t, *one) for one in zip((null, text), rules, residuals, strict=True))
    return w * here + (1 - w) * away


@dataclass(frozen=True, eq=False)
class Run:
    """A run that is read: ``latents``, S + 1 tensors (1, 4, h, w) from noise to picture, made under ``text`` and
    ``nulls`` (1, T, width), of which there is one or one a step, and under an adapter's ``residuals``, of the
    null's half and of the text's."""

    latents: list
    text: torch.Tensor
    nulls: list
    residuals: tuple = (None, None)

    def null(self, step):
        return self.nulls[step if len(self.nulls) > 1 else 0]

    def states(self, unet, step, t):
        """{Q, K, V} of every self-attention at a step, of both halves of guidance, the null's first."""
        halves = Remember(), Remember()
        for text, half, given in zip((self.null(step), self.text), halves, self.residuals, strict=True):
            predict(unet, self.latents[step], t, text, half, given)
        return halves


@torch.no_grad()
def walked(unet, ddim, source, w):
    """Algorithm 2's line 9 and algorithm 5's line 3: the :class:`Run` that DDIM takes from the ``source``'s noise under
    its null embeddings, wherever that leads. Algorithm 3 has it lie on the source's latents instead."""
    latents = source.latents[:1]
    for step, t in enumerate(ddim.timesteps.tolist()):
        noise = guided(unet, latents[-1], t, source.text, source.null(step), w)
        latents = [*latents, ddim.step(noise, t, latents[-1]).prev_sample]
    return Run(latents, source.text, source.nulls)


def printed_nulls(unet, ddim, source, w, inner, eta):
    """Algorithm 2: at each step ``inner`` plain gradient steps of ``eta`` on the norm of what is missing, each step
    begun at the nulls of the one before; S tensors (1, T, width). Call it outside torch.inference_mode."""
    z, null, found = source.latents[0], source.nulls[0], []
    for step, t in enumerate(ddim.timesteps.tolist()):
        with torch.no_grad():
            here = predict(unet, z, t, source.text, Plain())
        for _ in range(inner):
            null = null.detach().clone().requires_grad_()
            with torch.enable_grad():
                away = unet(z, t, encoder_hidden_states=null).sample
                missing = source.latents[step + 1] - ddim.step(w * here + (1 - w) * away, t, z).prev_sample
                (slope,) = torch.autograd.grad(missing.norm(), null)
            null = (null - eta * slope).detach()
        found.append(null.detach())
        with torch.no_grad():
            z = ddim.step(guided(unet, z, t, source.text, found[-1], w), t, z).prev_sample
    return found


# ---- MaSaFusion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """``steps`` of DDIM on the grid ``kind`` under guidance ``w``; what is substituted is so from step ``first`` to
    before ``last``, from self-attention ``layer`` on; the page says "corresponded layers". ``queries`` are SOURCES or
    OWN."""

    kind: str
    steps: int
    w: float
    first: int
    last: int
    layer: int
    queries: str = SOURCES

    @property
    def outside(self):
        return {SOURCES: bar, OWN: bar_own}[self.queries]


@dataclass(frozen=True, eq=False)
class Edit:
    """C^S, C^T and the empty text (1, T, width); A, a boolean (h, w); and C^t2i as an adapter's residuals, of the
    null's half and of the text's, None for none."""

    source: torch.Tensor
    target: torch.Tensor
    null: torch.Tensor
    region: torch.Tensor
    residuals: tuple = (None, None)


def mixed(region, outside, inside):
    """Equations 9, 10 and 14: the noise of pixel i, by whether i is in A."""
    return torch.where(region, inside, outside)


@torch.no_grad()
def draw(unet, settings, edit, noise, outside=None, inside=None):
    """DDIM from ``noise`` (1, 4, h, w) with the noise mixed of two predictions of the whole picture, under C^S and
    under C^T; ``outside`` and ``inside`` are pairs of a :class:`Run` and what is done with its states, or None.

    Returns (S + 1 latents from noise to picture; the S mixed predictions).
    """
    ddim = reference.scheduler(settings.kind, settings.steps)
    latents, found = [noise], []
    for step, t in enumerate(ddim.timesteps.tolist()):

        def predicted(text, read, step=step, t=t):
            rules = PLAIN
            if read is not None and settings.first <= step < settings.last:
                run, how = read
                rules = [Substitute(half, how, settings.layer) for half in run.states(unet, step, t)]
            return guided(unet, latents[-1], t, text, edit.null, settings.w, rules, edit.residuals)

        found.append(mixed(edit.region, predicted(edit.source, outside), predicted(edit.target, inside)))
        latents.append(ddim.step(found[-1], t, latents[-1]).prev_sample)
    return latents, found


def intermediate(unet, settings, edit, source, x):
    """Algorithm 1, lines 3 to 5: x^t2i from the gaussian noise ``x`` by equation 9, beside the :class:`Run` ``source``.
    Returns as :func:`draw`."""
    return draw(unet, settings, edit, x, outside=(source, settings.outside))


def target(unet, settings, edit, source, t2i):
    """Algorithm 1, lines 6 to 9: x^T from the source's noise off A and the ``t2i`` latents' x on A, by equation 10.
    Returns as :func:`draw`."""
    start = mixed(edit.region, source.latents[0], t2i[0])
    form = Run(t2i, edit.target, [edit.null], edit.residuals)
    return draw(unet, settings, edit, start, outside=(source, settings.outside), inside=(form, hat))


def without_intermediate(unet, settings, edit, source):
    """Algorithm 5: x^T from the source's noise by equation 14; with a region of the whole picture, by equation 13.
    Returns as :func:`draw`."""
    fused = {"outside": (source, settings.outside), "inside": (source, hat_without_t2i)}
    return draw(unet, settings, edit, source.latents[0], **fused)


# ---- EmbCtrl -----------------------------------------------------------------------------------------------------


def control(source, target, columns):
    """The source's embedding (1, T, width) with the target's at ``columns``, those of the changed words (eq. 12)."""
    mixed = source.clone()
    mixed[:, columns] = target[:, columns]
    return mixed
