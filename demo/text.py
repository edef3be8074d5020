"""The demo model's text encoder as it is trained: CLIP's, small, over a compact table of the words it knows."""

import torch
from torch import nn
from torch.nn import functional as F

LAYERS, HEADS, TEXT_WIDTH = 2, 4, 128


class _Layer(nn.Module):
    """One CLIP layer with the host's parameter names, but without its in-place sums, which gradients cannot pass."""

    def __init__(self, width):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width) for n in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x):
        b, n, c = x.shape
        y, at = self.layer_norm1(x), self.self_attn
        q, k, v = (at[f"{name}_proj"](y).view(b, n, HEADS, c // HEADS).transpose(1, 2) for name in "qkv")
        x = x + at["out_proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c))
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))


class TextEncoder(nn.Module):
    """(B, 77) rows of the compact table to (B, 77, width)."""

    def __init__(self, width, words, length=77):
        super().__init__()
        self.token_embedding = nn.Embedding(words, width)
        self.position_embedding = nn.Embedding(length, width)
        self.layers = nn.ModuleList([_Layer(width) for _ in range(LAYERS)])
        self.final_layer_norm = nn.LayerNorm(width)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.1)

    def forward(self, rows):
        x = self.token_embedding(rows) + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)
