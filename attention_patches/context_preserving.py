"""Context-Preserving Adaptive Manipulation: a mask is edited, and everything around it is read from the source.

In the picture: inside the target mask the prompt is drawn, outside the background stays. Three parts make it up.
Preservation adaptation: in the self-attention, what lies outside the target mask reads the source's background, and
what lies inside reads itself or, where the object is to be kept, the source's object. Plain layers: a tenth of the
layers, drawn by a seed, is left alone, so that both grow together. Localized extraction: in the cross-attention, only
what lies inside the mask reads the prompt, everything else the empty one. All of it acts in both halves of the
guidance. It costs one UNet row a step, for the source under the empty prompt. It cannot keep what the mask covers.

Paper: "Rethinking Attentions in Zero-Shot Real Image Editing" (CPAM), sections 3.3 to 3.5, equations 1 to 4. Where it
leaves a choice, the choice has a name here.
"""

import random
from dataclasses import dataclass

from .controller import NULL, Controller
from .masks import HALF, Mask, Part, attend_parts
from .refinement import Refinement
from .values import Window


@dataclass(frozen=True, kw_only=True, eq=False)
class ContextPreserving(Controller):
    """Edits inside ``target_mask`` a source whose object ``source_mask`` covers.

    ``keep_object``: inside ``keeping``, from the self-attention ``object_layer`` on, counted from 0, the inside reads
    the source's object: the tokens of ``object_keys``. ``plain_share`` of the layers (0..1) is plain attention,
    drawn with ``seed``, anew in each step where ``plain_every_step``. ``refinement`` finds the target mask anew
    during sampling. ``preservation`` and ``extraction`` are the paper's two modules, adaptation of the self-attention
    and localized extraction in the cross-attention; a module that is off leaves its attention alone (figure 4).
    """

    both_halves = True
    mixes = True
    mixes_texts = True

    source_mask: Mask
    target_mask: Mask
    object_keys: Mask
    keep_object: bool = False
    keeping: Window = Window(0.08, 1.0)
    object_layer: int = 9
    plain_share: float = 0.1
    plain_every_step: bool = True
    seed: int = 0
    refinement: Refinement | None = None
    preservation: bool = True
    extraction: bool = True

    @property
    def reads(self):
        return (NULL,)

    @property
    def watch(self):
        return self.refinement and self.refinement.watch

    @property
    def masks(self):
        both = (("source_mask", self.source_mask), ("target_mask", self.target_mask))
        return tuple((f"{name} of Attune Context Preserving", m.pixels) for name, m in both)

    def edits(self, place):
        if self.refinement is None and not self.keep_object and self.target_mask.full:
            return False
        if place.kind == "cross":
            return self.extraction
        return self.preservation and not self.is_plain(place)

    def is_plain(self, place):
        """Whether this self-attention layer is one of those that are left alone."""
        step = place.step if self.plain_every_step else 0
        return random.Random(f"{self.seed} {step} {place.number}").random() < self.plain_share

    def target(self, step, steps, seen):
        """The target :class:`Mask` at the 0-based ``step`` of ``steps``."""
        found = self.refinement and self.refinement.find(step, steps, seen)
        return self.target_mask if found is None else Mask(found)

    def self_output(self, place, own, references, attend, seen):
        source, inside = references[NULL], self.target(place.step, place.steps, seen).on(place)
        background = Part(1 - inside, self.source_mask.on(place) < HALF, source)
        keeps = place.number >= self.object_layer and self.keeping.contains(place.step, place.steps)
        if self.keep_object and keeps:
            return attend_parts(attend, own, [Part(inside, self.object_keys.on(place) >= HALF, source), background])
        return attend_parts(attend, own, [Part(inside, None, own), background])

    def cross_output(self, place, out, own, references, attend, seen):
        nothing, inside = references[NULL], self.target(place.step, place.steps, seen).on(place)
        parts = [Part(1 - inside, None, nothing)]
        if out is None:
            return attend_parts(attend, own, [Part(inside, None, own), *parts])
        return attend_parts(attend, own, parts) + inside.to(out)[..., None] * out
