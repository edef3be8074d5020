"""Pictures of 1024 x 1024: nothing as large as picture tokens times picture tokens is ever made, by any method.

A UNet of SD 1.5's layout, with narrow layers and random weights, is run on latents of 128x128. Memory is the bytes of
tensors that are alive. The attention kernel is a linear one, as packs put one in the host's place, so that sixteen
layers of 16,384 tokens take no minutes; the host's own kernel is looked at once.
"""

import functools
from dataclasses import replace

import pytest
import torch
from comfy.ldm.modules import attention

from attune.attention_patches.free_prompt_editing import FreePromptEditing
from attune.attention_patches.values import split_heads
from attune.benchmark import cost
from attune.demo.model import UNET
from attune.nodes.invert import AttuneNullTextInversion

from . import bench as methods
from .bench import METHODS, outputs

TOKENS = 128 * 128
CEILING = TOKENS**2 / 8  # bytes: even a mask of bytes is eight times that, and a head's map in fp32 thirty-two times
NARROW = UNET | {"model_channels": 32, "channel_mult": (1, 2, 4, 4), "num_heads": 1, "num_head_channels": -1}


@pytest.fixture(scope="module")
def wide(bench):
    """The bench with the narrow network and a trajectory of two steps at 1024 x 1024; only the first is sampled."""
    with torch.inference_mode(False), torch.no_grad():  # gradients flow through it
        model = cost.random_model(NARROW)
        return at(bench, model, 128)


def at(bench, model, side):
    it = cost.subject(model, bench.clip, side, 2)
    run = {"trajectory": it.trajectory, "other": it.trajectory, "noise": it.noise}
    return bench.but(model=model, sigmas=it.trajectory.sigmas[:2], **run)


def linear_attention(q, k, v, heads, *args, **kwargs):
    """Shen et al. 2021, "Efficient Attention", arXiv 1812.01243: keys and values first, so nothing is N x N."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    return (q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)).transpose(1, 2).flatten(2)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(attention, "optimized_attention", linear_attention)


def measure(wide, model, positive, *negative):
    """The most bytes alive in sampling, and how many rows the UNet is run on."""
    rows = []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    most = cost.peak(lambda: wide.sample(model, positive, negative=negative[0] if negative else None))
    handle.remove()
    return most, sum(rows)


@pytest.fixture(scope="module")
def row(wide):
    """Bytes a row of stock sampling."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(attention, "optimized_attention", linear_attention)
        most, rows = measure(wide, wide.model, wide.text("a picture"))
    return most / rows


def beyond(wide, make, row):
    """Bytes over those of as many rows of stock sampling."""
    most, rows = measure(wide, *make(wide, 1.0))
    return most - rows * row


FPE = "free prompt editing"
LARGEST = METHODS | {FPE: functools.partial(methods.free_prompt_editing, layers="1-16")}  # by itself in small layers


@pytest.mark.parametrize("name", LARGEST)
def test_no_method_makes_anything_of_tokens_times_tokens(name, wide, row, linear):
    assert beyond(wide, LARGEST[name], row) < CEILING


def test_nor_does_the_hosts_own_kernel(wide, row):
    wide = wide.but(guidance=1.0)
    assert beyond(wide, LARGEST[FPE], row) < CEILING


def test_a_map_would_be_seen(wide, row, linear, monkeypatch):
    """Even one of bytes, in one layer: a mask that says which token may see which."""

    def masked(self, place, own, references, attend, seen):
        if place.number < 15:
            return None
        mask = own.q.new_ones(place.tokens, place.tokens, dtype=torch.bool)
        return attend(own.q, own.k, own.v) * mask[:1, :1]

    monkeypatch.setattr(FreePromptEditing, "self_output", masked)
    assert beyond(wide, LARGEST[FPE], row) > 2 * CEILING


def test_learning_null_embeddings_makes_none_either(bench, wide):
    """At 512 x 512, since backward is slow: beside as many tokens times tokens in fp32."""
    small = at(bench, wide.model, 64)
    settings = bench.text(""), 7.5, 1, 0.01, 1e-5, True
    prompt = replace(small.trajectory, conditioning=bench.text("a picture"))
    most = cost.peak(lambda: outputs(AttuneNullTextInversion, prompt, small.model, *settings))
    assert most < 64**4 * 4
