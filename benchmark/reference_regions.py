"""Region prompts as the paper describes them, on diffusers ("Rethinking Attentions in Zero-Shot Real Image Editing",
CPAM: section 3.1, "attending each prompt to different parts of latent noise", and figure 2). No code of its authors is
known.

Written apart from Attune's own, and shares with it text embeddings and weights only. Which part of the latent a token
of a coarser level is, and what overlapping or soft regions read, the paper does not say; it is said here.

Shapes: P prompts, T text columns, H heads, N picture tokens, D a head's width.
"""

import functools

import torch

from . import reference


def shares(regions, tokens):
    """How much each of ``tokens`` picture tokens reads each prompt, (P, N): first the rest, then the ``regions``, masks
    (H, W) in 0..1, whose greatest value under a token counts. Regions that overlap share in proportion, and what they
    leave of a token is the rest's.
    """
    height, width = regions[0].shape
    rows = round((tokens * height / width) ** 0.5)
    columns, found = tokens // rows, []
    for token in range(tokens):
        # The pixels that the token covers, whole or in part.
        down, across = divmod(token, columns)
        top, bottom = down * height // rows, -(-(down + 1) * height // rows)
        left, right = across * width // columns, -(-(across + 1) * width // columns)
        inside = [float(region[top:bottom, left:right].max()) for region in regions]
        rest = max(0.0, 1.0 - sum(inside))
        found.append([part / (rest + sum(inside)) for part in (rest, *inside)])
    return torch.tensor(found).T


class _Attention:
    """A diffusers attention processor for one row, which reads the text that it is given, or each prompt in turn."""

    def __init__(self, holder, weights):
        self.holder, self.weights = holder, weights

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))

        def read(text):
            k, v = (attn.head_to_batch_dim(layer(text)) for layer in (attn.to_k, attn.to_v))
            return (q @ k.transpose(-1, -2) * attn.scale).softmax(-1) @ v

        if encoder_hidden_states is None:
            out = read(hidden_states)
        elif self.holder[0] is None:
            out = read(encoder_hidden_states)
        else:
            parts = zip(self.weights(q.shape[1]), self.holder[0], strict=True)
            out = sum(weight[None, :, None] * read(text) for weight, text in parts)
        return attn.to_out[0](attn.batch_to_head_dim(out))


@torch.no_grad()
def draw(unet, kind, noise, texts, regions, null, guidance, steps):
    """Draws from ``noise`` (1, 4, h, w), in diffusers' coordinates, a picture whose rest reads the first of ``texts``
    (1, T, width) and whose ``regions``, masks (H, W), read the others in order; guidance's other half reads ``null``
    everywhere. ``kind`` and ``steps`` as in :func:`reference.scheduler`. Returns S + 1 latents.
    """
    ddim, before, latents = reference.scheduler(kind, steps), unet.attn_processors, [noise]
    holder, weights = [None], functools.cache(functools.partial(shares, regions))
    unet.set_attn_processor({name: _Attention(holder, weights) for name in before})
    try:
        for t in ddim.timesteps.tolist():
            holder[0] = None
            empty = unet(latents[-1], t, encoder_hidden_states=null).sample
            holder[0] = texts
            clean = unet(latents[-1], t, encoder_hidden_states=texts[0]).sample
            latents.append(ddim.step(empty + guidance * (clean - empty), t, latents[-1]).prev_sample)
    finally:
        unet.set_attn_processor(before)
    return latents
