"""Free-Prompt-Editing: the picture is put together as the source is, of whatever the new prompt asks for.

In the picture: layout and outlines stay, what things are made of and look like follows the prompt. The source's
self-attention map is used on the target's values, in the middle layers and for one stretch of the steps. The
cross-attention is not touched, since its maps carry what the words mean, so the source needs no caption. It costs one
UNet row a step, for the source. It cannot move or reshape things.

The map itself is never made: attention with the source's queries and keys on the target's values is the same.

Paper: Liu et al., "Towards Understanding Cross and Self-Attention in Stable Diffusion for Text-Guided Image Editing",
section 4, algorithms 1 and 2. The layers are those of the authors' code, 3 to 13 of 16, or the paper's, 4 to 14.
"""

from dataclasses import dataclass

from .controller import Controller
from .values import QKV, Window


@dataclass(frozen=True, kw_only=True, eq=False)
class FreePromptEditing(Controller):
    """Inside ``window``, in the layers of at most ``token_limit`` picture tokens, or in ``layers``, counted from 0,
    where that is not None.
    """

    reference: str
    window: Window
    token_limit: int = 1024
    layers: frozenset | None = None

    @property
    def reads(self):
        return (self.reference,)

    def edits(self, place):
        if place.kind != "self" or not self.window.contains(place.step, place.steps):
            return False
        return place.tokens <= self.token_limit if self.layers is None else place.number in self.layers

    def self_attention(self, place, own, references):
        source = references[self.reference]
        return QKV(source.q, source.k, own.v)
