"""Region prompts: each region of the picture reads a prompt of its own.

In the picture: what a region's prompt names is drawn in the region, and since the self-attention is left whole, the
regions grow together in one light and one style. The prompts stand one behind the other in one conditioning, and each
picture token reads those whose regions it lies in. It needs no source and costs no UNet row.

Paper: "Rethinking Attentions in Zero-Shot Real Image Editing" (CPAM), section 3.1 and figure 2.
"""

from dataclasses import dataclass

import torch

from .controller import Controller


@dataclass(frozen=True, kw_only=True, eq=False)
class RegionPrompts(Controller):
    """``lengths`` are the token counts of the prompts in the conditioning; the first is read wherever no region is,
    and the others in the regions ``masks`` (one :class:`Mask` each). Where regions overlap they share.
    """

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

    def cross_map(self, place, own, references):
        shares = self.shares(place).to(own)[:, :, None, :, None]
        # A prompt read alone: its own columns, scaled to add up to 1.
        texts = [text / text.sum(-1, keepdim=True).clamp(min=1e-30) for text in own.split(self.lengths, -1)]
        return torch.cat([share * text for share, text in zip(shares, texts, strict=True)], -1)
