"""Negative-prompt inversion (Miyake et al. 2023): the caption in the place of the empty text, or a text between both.

Guidance away from the caption itself cancels out, so that the picture comes back. Nearer to the empty text it leads
further: the edit shows more, and the picture comes back less.
"""

import torch


def between(caption, empty, share):
    """A text ``share`` (0..1) of the arc from the ``caption``'s embedding to the ``empty`` one's, both (B, T, C) or (B,
    C), as ProxNPI's code interpolates (Han et al. 2024): on the sphere, all of a picture's numbers as one vector."""
    a, b = torch.broadcast_tensors(caption.float(), empty.float())
    ways = [one.flatten(1) / one.flatten(1).norm(dim=1, keepdim=True) for one in (a, b)]
    angle = (ways[0] * ways[1]).sum(1).clamp(-1, 1).acos().view(-1, *[1] * (a.dim() - 1))
    if share in (0, 1):  # exactly an end, which rounding would miss
        return (a, b)[int(share)].to(caption)
    # Where both point the same way there is no arc, and a line is the same.
    part = torch.where(angle > 1e-4, torch.sin((1 - share) * angle) / torch.sin(angle), 1 - share)
    rest = torch.where(angle > 1e-4, torch.sin(share * angle) / torch.sin(angle), share)
    return (part * a + rest * b).to(caption)
