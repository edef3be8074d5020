"""Mask refinement: the target mask follows the object while the picture is being drawn.

In the picture: a new object is not held to the outline of the old one, because the region that may change is found
anew in every step, from where the object's words have looked in the steps before.

Paper: "Rethinking Attentions in Zero-Shot Real Image Editing" (CPAM), section 3.5, mask refinement. The paper names
neither levels nor numbers; here they are all settings.
"""

import hashlib
from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor

from .maps import stretch
from .masks import touched
from .values import first_step
from .watch import Watch, WatchedWords

STRETCHED, SPREAD = "least to greatest", "standard deviations"
STANDARDISATIONS = STRETCHED, SPREAD


@dataclass(frozen=True, eq=False)
class Refinement:
    """How a target mask is found: from ``words`` of the target prompt, in the level nearest to ``level`` picture
    tokens, after ``after`` (a share) of the steps.

    ``standardisation`` says what ``threshold`` counts in: 0..1 between the map's least and greatest value, or
    standard deviations from its mean. The mask then reaches ``grow`` tokens further. ``log`` holds what was found.
    """

    words: tuple
    after: float = 0.2
    standardisation: str = SPREAD
    threshold: float = 1.0
    grow: int = 1
    level: int = 256
    positions: tuple = ()
    log: "MaskLog" = field(default_factory=lambda: MaskLog())

    def for_prompt(self, tokens):
        """The same for a target prompt's :class:`words.Tokens`. Raises ValueError where a word is not in it."""
        change = "words on Attune Mask Refinement or the target prompt on Attune Context Preserving"
        return replace(self, positions=tokens.positions(list(self.words), change))

    @property
    def watch(self):
        return Watch(WatchedWords(target_inside=self.positions), self.level) if self.after < 1 else None

    def find(self, step, steps, seen):
        """The mask (B, h, w) of 0 and 1 at the 0-based ``step`` of ``steps``, or None while it is too early."""
        if seen.before is None or step < first_step(self.after, steps):
            return None
        return self.refine(seen.before[1])

    def refine(self, heat):
        """The mask (B, h, w) of 0 and 1 that maps (B, h, w) of the words make."""
        mask = (standardised(heat, self.standardisation) > self.threshold).float()
        return F.max_pool2d(mask, 2 * self.grow + 1, 1, self.grow)


def standardised(heat, standardisation):
    """Maps (B, h, w) between their least (0) and greatest (1), or in standard deviations from their mean.

    A flat map becomes 0.
    """
    if standardisation == STRETCHED:
        return stretch(heat)
    spread = heat.std((1, 2), keepdim=True)
    # What rounding alone makes different is flat.
    flat = spread <= 1e-5 * heat.abs().amax((1, 2), keepdim=True)
    return ((heat - heat.mean((1, 2), keepdim=True)) / spread.clamp(min=1e-12)).masked_fill(flat, 0.0)


@dataclass(frozen=True, eq=False)
class Found:
    """The target masks (S, B, h, w) of one sampling, at the 0-based ``steps`` of ``total``."""

    masks: Tensor
    steps: tuple
    total: int

    def last(self, size):
        """The last step's, (B, H, W) at a latent's ``size``, as it was read there."""
        masks = self.masks[-1]
        return touched(masks, tuple(size)).unflatten(1, tuple(size))


class MaskLog:
    """The masks of the last samplings, each under the latent that it ended with.

    A node's outputs are made before sampling, so what is found there comes out behind the sampler, where the latent
    says which sampling is meant.
    """

    KEPT = 4

    def __init__(self):
        self._found = {}

    def keep(self, latent, found):
        """Puts away what was :class:`Found` in the sampling that ended with ``latent``."""
        name = _name(latent)
        self._found.pop(name, None)
        self._found[name] = found
        while len(self._found) > self.KEPT:
            self._found.pop(next(iter(self._found)))

    def masks(self, latent):
        """What was :class:`Found` in the sampling that ended with ``latent``, or None for one that is not known."""
        return self._found.get(_name(latent))


def _name(latent: Tensor):
    return hashlib.sha256(latent.detach().float().cpu().numpy().tobytes()).hexdigest()
