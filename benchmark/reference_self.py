"""Free-Prompt-Editing and MasaCtrl as their papers' code runs them, on diffusers.

FPE: Liu et al. 2024, "Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided Image
Editing", arXiv 2403.03431. MasaCtrl: Cao et al. 2023, "Mutual Self-Attention Control", arXiv 2304.08465.

Source and target are drawn in one batch [uncond source, uncond target, cond source, cond target] a step, with every
attention map written out as probabilities. Written apart from Attune's own edits, which it is there to check, and
shares with the pack text embeddings and weights only.

Shapes: T text columns, H heads, N picture tokens, D a head's width, S steps. All on the CPU, fp32. Layers are counted
from 0, self- and cross-attention each for itself, in the order in which the UNet runs them.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import reference

UNCOND_SOURCE, UNCOND_TARGET, COND_SOURCE, COND_TARGET = range(4)  # rows of the batch
HALVES = (UNCOND_SOURCE, UNCOND_TARGET), (COND_SOURCE, COND_TARGET)
NEAREST_TO = 256  # picture tokens of the level whose cross-attention makes MasaCtrl's masks: 16x16


class Nothing:
    """Plain drawing; the two methods below say what they do otherwise."""

    def self_attention(self, run, q, k, v, scale):
        """What the self-attention layer ``run.layer`` puts out in step ``run.step``: (4, H, N, D), from the like."""
        return _map(q, k, scale) @ v


@dataclass(frozen=True)
class FreePrompt(Nothing):
    """The source's self-attention map in the place of the target's, in the conditional half alone.

    ``steps`` are the first and one past the last; the layers are ``layers``, or, where that is None, those with N at
    most ``limit``, which is the authors' code's rule.
    """

    steps: tuple
    limit: int = 1024
    layers: tuple | None = None

    def self_attention(self, run, q, k, v, scale):
        p = _map(q, k, scale)
        chosen = p.shape[2] <= self.limit if self.layers is None else run.layer in self.layers
        if chosen and self.steps[0] <= run.step < self.steps[1]:
            p[COND_TARGET] = p[COND_SOURCE]
        return p @ v


@dataclass(frozen=True, eq=False)
class Mutual(Nothing):
    """The target's queries read the source's keys and values, each guidance half its own, in ``steps`` (the first, one
    past the last) and from layer ``layer`` on, or in the ``layers`` and the steps ``listed`` where those are given, as
    the authors' code takes them. With ``union`` they read the target's own keys and values beside them: that class of
    the authors' code stops with an error, so this is as it says of itself.

    With ``source`` and ``target`` the object's queries read the object's keys and the others the rest: each is a mask
    (h, w) in 0..1, or columns of words, whose cross-attention of the step so far makes one, above ``threshold``.
    A mask reaches a level by its greatest value under each token, of which a key needs 0.5; queries that have no key
    to read attend to their own row, as without an edit. With ``quirk`` it is as in the authors' code: a mask reaches a
    level by the value in a token's corner, so that thin ones are lost, queries without keys read all keys alike, and a
    key whose value is neither 0 nor 1 is read by both parts, with the value added to its score.
    """

    steps: tuple
    layer: int = 10
    source: torch.Tensor | tuple | None = None
    target: torch.Tensor | tuple | None = None
    threshold: float = 0.1
    quirk: bool = False
    layers: tuple | None = None
    listed: tuple | None = None
    union: bool = False

    def self_attention(self, run, q, k, v, scale):
        out = _map(q, k, scale) @ v
        here = run.layer >= self.layer if self.layers is None else run.layer in self.layers
        now = self.steps[0] <= run.step < self.steps[1] if self.listed is None else run.step in self.listed
        if here and now:
            for source, target in HALVES:
                keys, values = k[source], v[source]
                if self.union:
                    keys, values = (torch.cat([x[source], x[target]], 1) for x in (k, v))
                scores = q[target] @ keys.transpose(-1, -2) * scale
                out[target] = self._read(run, scores, values, out[target].clone())
        return out

    def _read(self, run, scores, values, plain):
        """(H, N, D) that one half's target reads with ``scores`` (H, N, M) from the values (H, M, D); ``plain`` is what
        it would put out by itself. M is N, or, in a union, 2 N, the source's first.
        """
        if self.source is None:
            return scores.softmax(-1) @ values
        size = run.grid(scores.shape[1])
        lies = self._mask(run, self.source, COND_SOURCE, size)
        weight = self._mask(run, self.target, COND_TARGET, size)
        if self.quirk:
            inside, outside = (self.among(scores + lies, values, which, plain) for which in (lies != 0, lies != 1))
        else:
            keys = (torch.cat([lies, weight]) if self.union else lies) >= 0.5
            inside, outside = (self.among(scores, values, which, plain) for which in (keys, ~keys))
        return weight[:, None] * inside + (1 - weight[:, None]) * outside

    def among(self, scores, values, keys, plain):
        """What is read of the ``keys`` (M,) bool alone."""
        if self.quirk:  # beside a number's least value a score is nothing, so that none stands out where all have it
            return (scores + torch.finfo(scores.dtype).min * ~keys).softmax(-1) @ values
        return scores.masked_fill(~keys, -torch.inf).softmax(-1) @ values if keys.any() else plain

    def _mask(self, run, given, row, size):
        """(N,) in 0..1 at a level of ``size`` (h, w)."""
        if not torch.is_tensor(given):
            heat = run.words(row, given)
            heat = (heat - heat.min()) / (heat.max() - heat.min())
            given = (heat > self.threshold).float()
        given = given[None, None].float()
        return (F.interpolate(given, size) if self.quirk else F.adaptive_max_pool2d(given, size)).flatten()


def _map(q, k, scale):
    return (q @ k.transpose(-1, -2) * scale).softmax(-1)


# ---- drawing -----------------------------------------------------------------------------------------------------


class _Step:
    """What the attention layers share while one step is drawn."""

    def __init__(self, method, step, ratio):
        self.method, self.step, self.ratio = method, step, ratio
        self.layer = -1  # the self-attention layer that runs
        self.maps = {}  # N -> maps (4, N, T) of the cross-attention layers so far, meaned over heads

    def grid(self, tokens):
        """(h, w) of a level with so many tokens; the picture is ``ratio`` times as wide as high."""
        height = round((tokens / self.ratio) ** 0.5)
        return height, tokens // height

    def words(self, row, columns):
        """(h, w), how much each picture token of a row has read the columns so far, at the level of 16x16."""
        tokens = min(self.maps, key=lambda n: abs(torch.tensor(n / NEAREST_TO).log()))
        heat = torch.stack(self.maps[tokens])[:, row].mean(0)
        return heat[:, list(columns)].sum(-1).view(self.grid(tokens))


class _Attention:
    """A diffusers attention processor that writes its map out and lets the method read other rows."""

    def __init__(self, holder):
        self.holder = holder

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        run, cross = self.holder[0], encoder_hidden_states is not None
        text = encoder_hidden_states if cross else hidden_states
        layers = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (attn.head_to_batch_dim(x).unflatten(0, (len(hidden_states), -1)) for x in layers)
        if cross:
            p = _map(q, k, attn.scale)
            run.maps.setdefault(p.shape[2], []).append(p.mean(1))
            out = p @ v
        else:
            run.layer += 1
            out = run.method.self_attention(run, q, k, v, attn.scale)
        return attn.to_out[0](attn.batch_to_head_dim(out.flatten(0, 1)))


@torch.no_grad()
def draw(unet, scheduler_kind, noise, source, target, nulls, guidance, steps, method, pinned=None):
    """Draws source and target from one noise (1, 4, h, w) in diffusers' coordinates, both under ``guidance``.

    ``source`` and ``target`` (1, T, width) are the prompts' embeddings, the source's that of "" for a picture without
    a caption; ``nulls`` holds one embedding of "" or one for each step; ``scheduler_kind`` and ``steps`` are as in
    :func:`reference.scheduler`. ``pinned``, latents (1, 4, h, w) from noise to picture, take the source row's place
    before each step, as FPE's code overwrites it; without, the row runs freely, as MasaCtrl's does unless asked.

    Returns S + 1 tensors (2, 4, h, w), source and target, from noise to picture.
    """
    ddim = reference.scheduler(scheduler_kind, steps)
    nulls = nulls if len(nulls) > 1 else list(nulls) * steps
    holder, before = [None], unet.attn_processors
    unet.set_attn_processor({name: _Attention(holder) for name in before})
    try:
        latents = [noise.repeat(2, 1, 1, 1)]
        for step, (t, null) in enumerate(zip(ddim.timesteps.tolist(), nulls, strict=False)):
            holder[0] = _Step(method, step, noise.shape[3] / noise.shape[2])
            z = latents[-1]
            if pinned is not None:
                z = torch.cat([pinned[step], z[1:]])
            text = torch.cat([null, null, source, target])
            empty, clean = unet(torch.cat([z, z]), t, encoder_hidden_states=text).sample.chunk(2)
            latents.append(ddim.step(empty + guidance * (clean - empty), t, z).prev_sample)
    finally:
        unet.set_attn_processor(before)
    return latents
