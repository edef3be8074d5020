"""A sketch of a picture: its outlines as white lines on black, as a sketch or canny adapter reads them.

Edges are found in each colour by itself, since two colours of one brightness have none in gray. torch, kornia and
scipy.
"""

import math

import numpy as np
import scipy.ndimage
import torch
from kornia.filters import canny
from torch.nn import functional as F


def outlines(image, threshold, smooth, width):
    """Lines (B, H, W) of 0 and 1 in pictures (B, H, W, 3) of 0..1.

    ``threshold`` in 0..1 is the step in a colour that counts as an edge; ``smooth`` >= 0 the blur before looking, in
    pixels; ``width`` >= 1 the lines' width in pixels.
    Source: Canny, "A Computational Approach to Edge Detection" (1986), as kornia has it.
    """
    pictures = image[..., :3].float().movedim(-1, 1)
    channels = pictures.flatten(0, 1)[:, None]
    sigma = max(smooth, 1e-3)
    reach = min(2 * math.ceil(2 * smooth), 2 * min(pictures.shape[2:]) - 2) + 1  # kornia mirrors at the border
    # What kornia's Sobel filter gives on a step of 1 that was blurred so.
    full = 2 * (math.erf(1.5 / (sigma * 2**0.5)) + math.erf(0.5 / (sigma * 2**0.5)))
    high = max(threshold * full, 1e-4)
    _, found = canny(channels, high / 2, high, (reach, reach), (sigma, sigma), hysteresis=False)
    lines = connected(found[:, 0]).unflatten(0, pictures.shape[:2]).amax(1)
    before = (width - 1) // 2
    lines = F.pad(lines, (before, width - 1 - before) * 2)
    return (F.max_pool2d(lines, width, 1) > 0).to(torch.float32)


def connected(edges):
    """Edges (B, H, W) of 0, weak 0.5 and strong 1: a weak one becomes 1 where a chain of neighbours leads to a strong
    one, diagonal ones too, and 0 elsewhere.

    It is what kornia's hysteresis gives, which looks at the whole picture once for every pixel of the longest chain.
    """
    near = np.zeros((3, 3, 3), bool)
    near[1] = True  # neighbours in one picture, and none in another
    edges, device = edges.cpu().numpy(), edges.device
    labels, count = scipy.ndimage.label(edges > 0, near)
    strong = np.zeros(count + 1, np.float32)
    strong[labels[edges == 1]] = 1
    return torch.from_numpy(strong[labels]).to(device)


def sketch_of(masks):
    """White outlines (1, H, W, 3), 2 pixels wide, of objects' masks (N, H, W) in 0..1, on black."""
    lines = outlines(masks[..., None].repeat(1, 1, 1, 3), 0.5, 0.0, 2).amax(0)
    return lines[None, ..., None].repeat(1, 1, 1, 3)
