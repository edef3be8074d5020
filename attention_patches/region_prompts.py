"""Region prompts: each region of the picture reads a prompt of its own.

In the picture: what a region's prompt names is drawn in the region, and since the self-attention is left whole, the
regions grow together in one light and one style. The prompts stand one behind the other in one conditioning, and each
picture token reads those whose regions it lies in. It needs no source and costs no UNet row.

Paper: "Rethinking Attentions in Zero-Shot Real Image Editing" (CPAM), section 3.1 and figure 2.
"""

from dataclasses import dataclass

import torch

from .controller import Controller
from .masks import Part, attend_parts
from .values import QKV


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionPrompts(Controller):
    """``lengths`` are the token counts of the prompts in the conditioning; the first is read wherever no region is,
    and the others in the regions ``masks`` (one :class:`Mask` each). Where regions overlap they share.
    """

    mixes_texts = True

    lengths: tuple
    regions: tuple

    @property
    def masks(self):
        return tuple(("mask of a region of Attune Region Prompts", m.pixels) for m in self.regions)

    def edits(self, place):
        return place.kind == "cross"

    def shares(self, place):
        """How much each picture token reads each prompt, (prompts, R or 1, N); they add up to 1."""
        regions = [mask.on(place) for mask in self.regions]
        rows = max(map(len, regions))
        regions = torch.stack([region.expand(rows, -1) for region in regions])
        total = regions.sum(0)
        return torch.cat([(1 - total).clamp(min=0)[None], regions]) / total.clamp(min=1)

    def cross_output(self, place, out, own, references, attend, seen):
        # Beside a longer negative the host repeats the texts; the first ones are enough.
        k, v = (t[:, : sum(self.lengths)].split(self.lengths, 1) for t in (own.k, own.v))
        texts = zip(k, v, strict=True)
        shares = self.shares(place)
        parts = [Part(share, None, QKV(own.q, *text)) for share, text in zip(shares, texts, strict=True)]
        made = attend_parts(attend, own, parts)
        # What another pack adds to the attention stays.
        return made if out is None else out + made - attend(*own)
