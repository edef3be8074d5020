"""Mutual self-attention: the new picture lays itself out, and takes what everything looks like from the source.

In the picture: the prompt may change pose, place and shape, while colours and textures are the source's. From one step
and layer on, the target's queries read the source's keys and values, in both halves of the guidance. Earlier steps and
layers are the target's own, where its layout comes from. With masks, the object reads only the object and the rest only
the rest. It costs one UNet row a step, or two where the source has a caption.

Paper: Cao et al., "MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing",
sections 3.2 and 3.3; step 4 of 50 and layer 10 of 16 are its defaults. Lists of layers and steps, and keys and values
of source and target side by side ("union"), are choices of the authors' code.
"""

from dataclasses import dataclass

import torch

from .controller import NULL, Controller
from .maps import stretch
from .masks import HALF, Mask, Part, attend_parts
from .values import QKV, Window
from .watch import Watch


@dataclass(frozen=True, kw_only=True, eq=False)
class MutualSelfAttention(Controller):
    """Inside ``window``, from the self-attention ``layer`` on, counted from 0; or in just the ``layers`` and ``steps``,
    sets counted from 0, where they are given. With ``joint`` each half reads the target's own keys and values beside
    the source's.

    ``source_mask`` and ``target_mask`` tell the object from the rest; where one is None, ``finder`` finds it in each
    step from the words' cross-attention in the layers so far, at ``threshold`` between least and greatest. Without
    either, all is read by all.
    """

    both_halves = True
    mixes = True

    reference: str
    window: Window
    layer: int = 10
    source_mask: Mask | None = None
    target_mask: Mask | None = None
    finder: Watch | None = None
    threshold: float = 0.1
    layers: frozenset | None = None
    steps: frozenset | None = None
    joint: bool = False

    @property
    def reads(self):
        return self.reference, NULL

    @property
    def watch(self):
        acts = self.window.start < self.window.end if self.steps is None else self.steps
        return self.finder if acts else None

    @property
    def masks(self):
        both = (("source_mask", self.source_mask), ("target_mask", self.target_mask))
        return tuple((f"{name} of Attune Mutual Self-Attention", m.pixels) for name, m in both if m is not None)

    def edits(self, place):
        layer = place.number >= self.layer if self.layers is None else place.number in self.layers
        step = self.window.contains(place.step, place.steps) if self.steps is None else place.step in self.steps
        return place.kind == "self" and layer and step

    def self_output(self, place, own, references, attend, seen):
        source = references[NULL if place.negative else self.reference]
        lies, goes = self._masks(seen)
        if self.joint:
            source = QKV(own.q, torch.cat([source.k, own.k], 1), torch.cat([source.v, own.v], 1))
        if lies is None or goes is None:
            return attend(own.q, source.k, source.v)
        lies, goes = lies.on(place) >= HALF, goes.on(place)
        figure, ground = lies, ~lies
        if self.joint:
            drawn = goes >= HALF
            rows = max(len(lies), len(drawn))
            lies, drawn = lies.expand(rows, -1), drawn.expand(rows, -1)
            figure, ground = torch.cat([lies, drawn], 1), torch.cat([~lies, ~drawn], 1)
        return attend_parts(attend, own, [Part(goes, figure, source), Part(1 - goes, ground, source)])

    def _masks(self, seen):
        """Where the object lies in the source and goes in the target; None where nothing has been seen yet."""
        if self.finder is None:
            return self.source_mask, self.target_mask
        if seen.now is None:
            return None, None
        lies, goes, *_ = (Mask((stretch(heat) > self.threshold).float()) for heat in seen.now)
        return self.source_mask or lies, self.target_mask or goes
