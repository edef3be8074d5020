"""Edits on SDXL and on SD 2.x, which predicts v, beside the papers' procedures on diffusers.

As :mod:`editing_parity` and :mod:`self_parity` have it for SD 1.x, with the small random models of :mod:`families`: a
picture is recorded, each edit is drawn by the pack's nodes and the stock sampler, and again by :mod:`reference_p2p` or
:mod:`reference_self` on diffusers' UNet of the family with the same weights.
"""

from dataclasses import dataclass, replace

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..demo import measure
from . import editing_parity, families, reference, self_parity, to_diffusers
from . import reference_p2p as paper
from .inversion import relative

STEPS, GUIDANCE = 5, 3.0
SOURCE = "a red circle and a blue square on a gray background"
RECOLORED, RESHAPED = SOURCE.replace("red", "yellow"), SOURCE.replace("circle", "star")
STRIPED, IN_PIECES = SOURCE.replace("red", "striped red"), SOURCE.replace("red", editing_parity.PIECES)
WIDE = 16, 24  # of the latents (h, w)


def _free(**changed):
    found = tuple(changed.items())
    return self_parity.Case(self_parity.FPE, RECOLORED, found, SOURCE, self_parity.DRAWN, size=WIDE)


CASES = {
    "SDXL": {
        "swap": editing_parity.Case(SOURCE, IN_PIECES),
        "refine, a word added": editing_parity.Case(SOURCE, STRIPED, editing_parity.REFINE),
        "re-weight after swap": editing_parity.Case(SOURCE, RESHAPED, limit=64, weights=(("star", 2.0),)),
        "FPE": _free(token_limit=96),
        "FPE, layers 5-12": _free(layers="5-12"),
    },
    "SD2": {
        "swap": editing_parity.Case(SOURCE, IN_PIECES),
        "FPE": _free(token_limit=96),
    },
}
NAMES = {"SDXL": "a small random SDXL", "SD2": "a small random SD 2.x, which predicts v"}
COMMON = {
    "layers_per_block": 2,
    "cross_attention_dim": families.COMMON["context_dim"],
    "use_linear_projection": True,
}
CONFIGS = {
    "SDXL": COMMON | {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 2),  # diffusers reads the number of heads here
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": families.SIZES // 6,
        "projection_class_embeddings_input_dim": families.SDXL["adm_in_channels"],
    },
    "SD2": COMMON | {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": (1, 1, 2, 2),
    },
}  # fmt: skip


class Bench(measure.Bench):
    """A family's model and texts; no scenes."""

    def __init__(self, family):
        self.family, self.model, self.clip = family, families.model(family), families.clip(family)
        self.count, self.seed, self.steps, self.guidance = 1, 0, STEPS, GUIDANCE


@dataclass(eq=False)
class Network:
    """Diffusers' UNet of a family, called as SD 1.x's is: it answers with epsilon.

    ``pooled`` (4, width) are the pooled texts of the rows [null, null, source, target] where the family reads any.
    """

    unet: object
    predicts_v: bool
    pooled: torch.Tensor | None = None

    @property
    def attn_processors(self):
        return self.unet.attn_processors

    def set_attn_processor(self, processors):
        self.unet.set_attn_processor(processors)

    def __call__(self, x, t, encoder_hidden_states):
        told = {}
        if self.pooled is not None:
            height, width = (8 * side for side in x.shape[2:])
            # The picture's size, what was cropped from its top and left, and the size to draw.
            sizes = torch.tensor([height, width, 0, 0, height, width]).expand(len(x), -1)
            told["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": sizes}
        found = self.unet(x, t, encoder_hidden_states=encoder_hidden_states, **told).sample
        if self.predicts_v:  # Salimans and Ho 2022, appendix D
            abar = reference.scheduler(reference.OFFSET_1, STEPS).alphas_cumprod[t]
            found = abar.sqrt() * found + (1 - abar).sqrt() * x
        return UNet2DConditionOutput(sample=found)


class _Family:
    """What a family's sides have of their own."""

    def unet(self):
        family = self.bench.family
        weights = self.bench.model.model.diffusion_model.state_dict()
        return Network(to_diffusers.unet(weights, CONFIGS[family]), predicts_v=family == "SD2")

    def prompt(self, text):
        clip, ids = self.bench.clip, []
        for chunk in next(iter(clip.tokenize(text).values())):
            tokens = [token for token, *_ in chunk]
            end = max(tokens)
            # Some of these text encoders pad with another token than the end, which the reference takes for padding.
            ids += [end if i > tokens.index(end) else token for i, token in enumerate(tokens)]
        spelled = [clip.tokenizer.untokenize([(token, 1.0)])[0][1] for token in ids]
        pieces = ["" if piece.startswith("<|") else piece.removesuffix("</w>") for piece in spelled]
        return paper.Prompt(text, tuple(ids), tuple(pieces), self.bench.text(text)[0][0])

    def theirs(self, case, trajectory, **kwargs):
        if self.bench.family == "SDXL":
            rows = "", "", case.source, case.target
            self.network.pooled = torch.cat([self.bench.text(text)[0][1]["pooled_output"] for text in rows])
        return super().theirs(case, trajectory, **kwargs)


class WordSides(_Family, editing_parity.Sides):
    """For :class:`editing_parity.Case`."""

    def plain(self, case, trajectory):
        nothing = replace(case, source=case.target, kind=editing_parity.NONE, weights=(), cross=(0, 0), self_=(0, 0))
        return self.theirs(nothing, trajectory)[1]


class StructureSides(_Family, self_parity.Sides):
    """For :class:`self_parity.Case`."""

    def plain(self, case, trajectory):
        return self.theirs(replace(case, changed=()), trajectory, plain=True)[1]


class Sides:
    """Both kinds for one family; what was drawn once is kept."""

    def __init__(self, family):
        bench = Bench(family)
        self.words, self.structure = WordSides(bench), StructureSides(bench)

    def of(self, case):
        return self.words if isinstance(case, editing_parity.Case) else self.structure

    def measure(self, case):
        """How far the last latents lie apart, and how large the edit's own effect is; both relative."""
        by = self.of(case)
        trajectory = by.trajectory(case, 0)
        theirs = by.theirs(case, trajectory)[1]
        return relative(by.ours(case, trajectory), theirs), relative(theirs, by.plain(case, trajectory))
