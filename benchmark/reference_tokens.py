"""Dynamic Prompt Learning as its paper and its authors' code run it, on diffusers and transformers (Wang et al. 2023,
"Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing").

The text encoder is transformers' CLIP, whose whole table of words AdamW updates, as in the authors' code, with every
row but the placeholders' put back after each update. Attention maps are written out as probabilities. Written apart
from Attune's own code, which it is there to check; it shares with the pack token ids, noise and weights only.

Shapes: T = 77 text columns, W nouns, N picture tokens, S steps, V clusters. One picture, on the CPU, fp32.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from . import reference

CROSS, SELF = 256, 1024  # picture tokens of the levels that are read: 16x16 and 32x32
BALANCE, DISJOINT, BACKGROUND = range(3)  # the losses L_at, L_dj and L_bg


# ---- text --------------------------------------------------------------------------------------------------------


class Encoder(torch.nn.Module):
    """Transformers' CLIP text model with the demo model's ``weights`` ("text" of its file) and, behind the rows of the
    words that it knows, one placeholder row for each of the token ids ``nouns``, begun as that token's."""

    def __init__(self, weights, nouns, heads=4):
        super().__init__()
        weights = {name: tensor.float() for name, tensor in weights.items()}
        self.known = {int(number): row for row, number in enumerate(weights.pop("token_ids"))}
        table = weights.pop("token_embedding.weight")
        table = torch.cat([table, table[[self.row(number) for number in nouns]]])
        self.placeholders = range(len(table) - len(nouns), len(table))
        layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
        self.clip = CLIPTextModel(CLIPTextConfig(
            vocab_size=len(table), hidden_size=table.shape[1], intermediate_size=4 * table.shape[1],
            num_hidden_layers=layers, num_attention_heads=heads, hidden_act="quick_gelu", bos_token_id=None,
            eos_token_id=len(table) - 1,
        )).eval().requires_grad_(False)  # fmt: skip
        places = {"layers": "encoder.", "position_embedding": "embeddings."}
        named = {places.get(name.split(".")[0], "") + name: tensor for name, tensor in weights.items()}
        self.clip.load_state_dict({"embeddings.token_embedding.weight": table, **named})

    def row(self, number):
        """The row that a token id reads; one that the demo model never learned reads the unknown word's."""
        return self.known.get(int(number), self.known[-1])

    @property
    def table(self):
        return self.clip.get_input_embeddings().weight

    def forward(self, rows):
        """(1, 77, width) of 77 rows."""
        return self.clip(input_ids=torch.tensor([rows])).last_hidden_state


# ---- attention ---------------------------------------------------------------------------------------------------


class _Attention:
    """A diffusers attention processor that keeps its map, meaned over heads: ``maps`` holds (is cross-attention,
    (N, T or N)) of each layer, in the order in which they run."""

    def __init__(self):
        self.maps = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (attn.head_to_batch_dim(x) for x in projected)
        p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        self.maps.append((encoder_hidden_states is not None, p.mean(0)))
        return attn.to_out[0](attn.batch_to_head_dim(p @ v))


def every_map(unet, z, t, text):
    """(is cross-attention, map (N, T or N)) of every layer in one pass, meaned over heads."""
    before, one = unet.attn_processors, _Attention()
    unet.set_attn_processor(dict.fromkeys(before, one))
    try:
        unet(z, t, encoder_hidden_states=text)
    finally:
        unet.set_attn_processor(before)
    return one.maps


def look(unet, z, t, text):
    """(cross-attention (N, T) at 16x16, self-attention (N, N) at 32x32) of one pass, the means over the layers of these
    sizes; a picture that has no such level is read where it comes nearest."""
    maps = every_map(unet, z, t, text)
    return [level([p for cross, p in maps if cross == kind], n) for kind, n in ((True, CROSS), (False, SELF))]


def level(maps, tokens):
    size = min({len(p) for p in maps}, key=lambda n: abs(math.log(n / tokens)))
    return torch.stack([p for p in maps if len(p) == size]).mean(0)


@torch.no_grad()
def statistics(unet, kind, latents, text, inverting=False):
    """The mean cross- and self-attention, as :func:`look` gives them, along S + 1 ``latents`` (1, 4, h, w); with
    ``inverting`` in the passes that the authors' inversion makes, of each latent at the next level's time."""
    ddim = reference.scheduler(kind, len(latents) - 1)
    seen = [
        look(unet, z, t, text) for z, t in zip(latents[inverting:], ddim.timesteps.tolist(), strict=False)
    ]  # fmt: skip
    return [torch.stack(maps).mean(0) for maps in zip(*seen, strict=True)]


# ---- the background (section 3.3) --------------------------------------------------------------------------------


def background(cross, labels, nouns, threshold=0.2):
    """(N,) bool, the background: ``labels`` (N,) are the clusters of the self-attention's places, ``cross`` (n, T) the
    mean cross-attention, ``nouns`` the columns of each noun.

    A cluster is background unless some noun's map, lowered by its least value and divided by its greatest, has a mean
    above ``threshold`` in it.
    """
    side, small = round(len(labels) ** 0.5), round(len(cross) ** 0.5)
    seen = [cross[:, list(columns)].sum(1) for columns in nouns]
    seen = [torch.kron(m.view(small, small), torch.ones(side // small, side // small)).flatten() for m in seen]
    seen = torch.stack([(m - m.min().abs()) / m.max() for m in seen])
    scores = torch.stack([seen[:, labels == number].mean(1) for number in range(int(labels.max()) + 1)], 1)
    return ~(scores.amax(0) > threshold)[labels]


def cut(points, clusters, starts):
    """Labels (N,) of the best of some runs of scipy's k-means on points (N, D), by the sum of squared distances."""
    found = [kmeans2(points.double().numpy(), clusters, 300, minit="++", rng=seed) for seed in range(starts)]
    labels = [torch.from_numpy(np.asarray(labels)).long() for _, labels in found]
    return min(labels, key=lambda one: spread(points, one, clusters))


def spread(points, labels, clusters):
    """The sum of squared distances of points (N, D) from the means of their clusters."""
    parts = (points[labels == number] for number in range(clusters))
    return float(sum((part - part.mean(0)).square().sum() for part in parts if len(part)))


# ---- the losses (equations 6 to 8) -------------------------------------------------------------------------------


def losses(maps, nouns, outside):
    """(L_at, L_dj, L_bg) of cross-attention (N, T): ``nouns`` are the columns of each noun, ``outside`` (N,) in 0..1
    what none of them should look at.

    L_at is Attend-and-Excite's, as the authors' code took it over: the first and the last column are dropped, the rest
    times 100 goes through a softmax, each noun's map under a 3x3 Gaussian has a greatest value, and the loss is of the
    noun whose is least. L_dj is the mean cosine over pairs, L_bg that with the background.
    """
    side = round(len(maps) ** 0.5)
    shares = (maps[:, 1:-1] * 100).softmax(-1)
    smooth = [gaussian(shares[:, [c - 1 for c in columns]].sum(1).view(side, side)) for columns in nouns]
    balance = max(torch.clamp(1 - one.max(), min=0) for one in smooth)
    raw = [maps[:, list(columns)].sum(1) for columns in nouns]
    pairs = [cosine(raw[i], raw[j]) for i in range(len(raw)) for j in range(i)]
    return balance, sum(pairs) / len(pairs), sum(cosine(one, outside) for one in raw) / len(raw)


def printed_losses(maps, nouns, outside):
    """The same three as the page prints equations 8, 6 and 7: the shares themselves under the Gaussian, and sums, for
    L_dj over each pair in both orders."""
    side = round(len(maps) ** 0.5)
    seen = [maps[:, list(columns)].sum(1) for columns in nouns]
    balance = max(1 - gaussian(one.view(side, side)).max() for one in seen)
    pairs = [cosine(a, b) for i, a in enumerate(seen) for j, b in enumerate(seen) if i != j]
    return balance, sum(pairs), sum(cosine(one, outside) for one in seen)


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def gaussian(picture, sigma=0.5):
    """A picture (h, w) under Attend-and-Excite's kernel, whose exponent is -((x - mu) / (2 sigma))^2."""
    one = torch.tensor([math.exp(-((x / (2 * sigma)) ** 2)) for x in (-1, 0, 1)])
    kernel = one[:, None] * one[None]
    padded = F.pad(picture[None, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[0, 0]


def thresholds(step, steps, beta, alpha):
    """Equation 10 at the step of 50 that a step of ``steps`` stands for, counted from the noisy end."""
    return [b * math.exp(-step * 50 / steps / a) for b, a in zip(beta, alpha, strict=True)]


# ---- learning (algorithm 1) --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Weights, thresholds' starts and lengths of L_at, L_dj and L_bg; looks a step and AdamW's rate; guidance, updates
    a step of the null embedding, where it stops early, and whether it starts from the step before."""

    weights: tuple = (1.0, 0.05, 0.05)
    beta: tuple = (0.3, 0.9, 0.7)
    alpha: tuple = (25.0, 25.0, 50.0)
    inner: int = 21
    rate: float = 1e-3
    guidance: float = 7.5
    null_inner: int = 10
    epsilon: float = 1e-5
    warm: bool = True
    descent: bool = False  # algorithm 1 as printed: the gradient itself is subtracted, in place of AdamW's step


def learn(unet, encoder, kind, latents, ids, nouns, outside, null, settings):
    """Learns the placeholders of ``encoder``, one for each column of ``nouns`` in order, and null embeddings.

    ``latents`` are S + 1 tensors (1, 4, h, w) of an inversion from noise to picture, ``ids`` the caption's 77 token
    ids, ``null`` (1, T, width) the embedding of "". Call it where gradients may be taken.

    Returns (vectors, S tensors (R, width); nulls, S tensors (1, T, width); for each step the losses at every look, and
    for each step those of null-text inversion).
    """
    ddim = reference.scheduler(kind, len(latents) - 1)
    rows, columns = [encoder.row(number) for number in ids], [c for noun in nouns for c in noun]
    for column, row in zip(columns, encoder.placeholders, strict=True):
        rows[column] = row
    table = encoder.table.requires_grad_()
    z, e = latents[0], null
    vectors, nulls, found, null_found = [], [], [], []
    for step, t in enumerate(ddim.timesteps.tolist()):
        limits = thresholds(step, len(latents) - 1, settings.beta, settings.alpha)
        adam = torch.optim.SGD([table], 1.0) if settings.descent else torch.optim.AdamW([table], lr=settings.rate)
        found.append([])
        for _ in range(settings.inner):
            three = losses(look(unet, z, t, encoder(rows))[0], nouns, outside)
            found[-1].append([one.item() for one in three])
            if all(one < limit for one, limit in zip(found[-1][-1], limits, strict=True)):
                break
            adam.zero_grad()
            sum(weight * one for weight, one in zip(settings.weights, three, strict=True)).backward()
            kept = table.detach().clone()
            adam.step()
            with torch.no_grad():
                table[: encoder.placeholders[0]] = kept[: encoder.placeholders[0]]
        vectors.append(table[list(encoder.placeholders)].detach().clone())
        with torch.no_grad():
            eps = unet(z, t, encoder_hidden_states=encoder(rows)).sample
        e = (e if settings.warm else null).detach().clone().requires_grad_()
        i = 50 * step / (len(latents) - 1)
        adam = torch.optim.Adam([e], lr=1e-2 * (1 - i / 100))

        def down(embedding, z=z, t=t, eps=eps):
            empty = unet(z, t, encoder_hidden_states=embedding).sample
            return ddim.step(empty + settings.guidance * (eps - empty), t, z).prev_sample

        null_found.append([])
        for _ in range(settings.null_inner):
            loss = F.mse_loss(down(e), latents[step + 1])
            adam.zero_grad()
            loss.backward()
            adam.step()
            null_found[-1].append(loss.item())
            if loss.item() < settings.epsilon + i * 2e-5:
                break
        nulls.append(e.detach())
        with torch.no_grad():
            z = down(e)
    table.requires_grad_(False)
    return vectors, nulls, found, null_found
