"""Context-Preserving Adaptive Manipulation as its paper describes it, on diffusers ("Rethinking Attentions in Zero-Shot
Real Image Editing", CPAM, sections 3.3 to 3.5, equations 1 to 4). No code of its authors is known.

Row by row, as :mod:`reference_fusion`, whose passes it uses, and as far apart from Attune's own edits. Where the paper
leaves a choice open, it is a setting here.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import reference
from .reference_fusion import Plain, Remember, attend, predict

NEAREST_TO = 256  # picture tokens of the level that masks are found in: 16x16


@dataclass(frozen=True, eq=False)
class Settings:
    """``source`` and ``target`` are masks (H, W) in 0..1, ``object_`` the one whose keys are the object's.

    With ``keep`` the inside reads the object from step ``first`` and layer ``layer`` on. ``plain`` holds the (step,
    layer) of the self-attention layers that are left alone. ``words``, columns of the target prompt, find the target
    mask anew from step ``refined`` on: where their map stands ``threshold`` standard deviations above its mean, and
    ``grow`` tokens around. Without ``preserve`` the self-attention is left alone, and without ``extract`` all of the
    picture reads the prompt, as in figure 4.
    """

    source: torch.Tensor
    target: torch.Tensor
    object_: torch.Tensor
    keep: bool = False
    first: int = 4
    layer: int = 9
    plain: frozenset = frozenset()
    words: tuple = ()
    refined: int = 0
    threshold: float = 1.0
    grow: int = 1
    preserve: bool = True
    extract: bool = True


@dataclass(frozen=True, eq=False)
class _Half(Plain):
    """One half of guidance in one step: the source's and the target's masks on every level, what the source's pass
    under the empty text held, and the maps that the words have made so far."""

    settings: Settings
    step: int
    target: torch.Tensor
    source: Remember
    seen: list  # (tokens, heat (N,)) of this step's cross-attention layers
    ratio: float  # the picture's width by its height

    def self_attention(self, layer, q, k, v, scale):
        """Preservation adaptation, equations 1 to 3."""
        given, own = self.settings, attend(q, k, v, scale)
        if not given.preserve or (self.step, layer) in given.plain:
            return own
        theirs, inside = self.source.own[layer][1:], self._on(self.target, len(q[0]))[:, None]

        def read(keys):
            chosen = [x[:, keys] for x in theirs]
            return attend(q, *chosen, scale) if keys.any() else own

        kept = given.keep and self.step >= given.first and layer >= given.layer
        figure = read(self._on(given.object_, len(q[0])) >= 0.5) if kept else own
        ground = read(self._on(given.source, len(q[0])) < 0.5)
        return inside * figure + (1 - inside) * ground

    def cross_attention(self, layer, q, k, v, scale):
        """Localized extraction, equation 4: outside the target mask the empty text is read."""
        tokens = len(q[0])
        inside, p = self._on(self.target, tokens)[:, None], (q @ k.transpose(-1, -2) * scale).softmax(-1)
        self.seen.append((tokens, p.mean(0)[:, list(self.settings.words)].sum(-1)))
        if not self.settings.extract:
            return p @ v
        return inside * (p @ v) + (1 - inside) * attend(q, *self.source.text[layer], scale)

    def _on(self, mask, tokens):
        """A mask's greatest value under each of a level's tokens, (N,)."""
        return F.adaptive_max_pool2d(mask[None, None].float(), grid(tokens, self.ratio)).flatten()


def grid(tokens, ratio):
    height = round((tokens / ratio) ** 0.5)
    return height, tokens // height


def refine(heat, settings):
    """Mask refinement: (h, w) of 0 and 1, from the words' map (h, w)."""
    marked = (heat - heat.mean()) / heat.std() > settings.threshold
    return F.max_pool2d(marked[None, None].float(), 2 * settings.grow + 1, 1, settings.grow)[0, 0]


@torch.no_grad()
def draw(unet, kind, path, text, null, guidance, steps, settings):
    """Draws the target from the noise of a source's ``path`` (S + 1 latents (1, 4, h, w) from noise to picture), under
    ``text`` and ``null`` (1, T, width); ``kind`` and ``steps`` as in :func:`reference.scheduler`.

    Returns (S + 1 latents; the target mask (h, w) of each step).
    """
    ddim, ratio = reference.scheduler(kind, steps), path[0].shape[3] / path[0].shape[2]
    latents, masks, heat = [path[0]], [], 0.0
    for step, t in enumerate(ddim.timesteps.tolist()):
        source, seen = Remember(), []
        predict(unet, path[step], t, null, source)
        target = settings.target
        if settings.words and step >= max(settings.refined, 1):
            target = refine(heat, settings)
        masks.append(target)
        halves = [_Half(settings, step, target, source, found, ratio) for found in ([], seen)]
        z = latents[-1]
        empty, clean = (predict(unet, z, t, c, half) for c, half in zip((null, text), halves, strict=True))
        level = min((tokens for tokens, _ in seen), key=lambda n: abs(torch.tensor(n / NEAREST_TO).log()))
        heat = heat + sum(one for tokens, one in seen if tokens == level).view(grid(level, ratio))
        latents.append(ddim.step(empty + guidance * (clean - empty), t, z).prev_sample)
    return latents, masks
