import pytest
import torch
from torch.nn import functional as F

from attune.attention_patches.controller import Controller
from attune.attention_patches.prompt_swap import PromptSwap
from attune.attention_patches.values import QKV, Place, Window, apply_map, attention_map, split_heads


def place(kind, step, steps=50, grid=(16, 16)):
    return Place(kind, ("input", 1), 0, grid, step, steps)


def test_attention_by_hand_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    p = attention_map(q, k, 2)
    assert p.shape == (2, 2, 6, 5) and torch.allclose(p.sum(-1), torch.ones(2, 2, 6))
    true = F.scaled_dot_product_attention(*(split_heads(t, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    assert torch.allclose(apply_map(p, v, 2), true, atol=1e-6)


def test_half_precision_scores_are_fp32():
    q = torch.full((1, 1, 64), 60.0, dtype=torch.float16)  # 60 * 60 * 64 is beyond fp16
    p = attention_map(q, torch.cat([q, -q], 1), 1)
    assert p.dtype == torch.float32 and p.isfinite().all()


@pytest.mark.parametrize("start,end,inside", [(0, 0, []), (0, 1, range(10)), (0.2, 0.5, [2, 3, 4]), (1, 1, [])])
def test_window(start, end, inside):
    window = Window(start, end)
    assert [i for i in range(10) if window.contains(i, 10)] == list(inside)


def test_window_survives_floating_point():
    assert Window(0.29, 1).contains(29, 100) and not Window(0.29, 1).contains(28, 100)


@pytest.mark.parametrize("start,end", [(-0.1, 0.5), (0.6, 0.5), (0, 1.5), (float("nan"), 1)])
def test_bad_windows_are_refused(start, end):
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        Window(start, end)


def test_the_base_changes_nothing():
    base = Controller(prompt="x", tokens=77)
    own = QKV(*torch.randn(3, 1, 4, 8))
    assert not base.active(0, 50) and not base.edits(place("self", 0))
    assert base.self_attention(place("self", 0), own, {}) is own
    assert base.cross_map(place("cross", 0), own.q, {}) is own.q


def swap(mapper, cross=(0, 0.8), self_=(0, 0.4), limit=1024):
    return PromptSwap(
        prompt="x", tokens=mapper.shape[1], mapper=mapper, cross=Window(*cross), self_=Window(*self_), token_limit=limit
    )


def test_swap_acts_where_the_paper_says():
    edit = swap(torch.eye(77))
    # Prompt-to-Prompt's table: of 50 steps, cross until 39 and self until 19.
    assert [s for s in range(50) if edit.edits(place("cross", s))] == list(range(40))
    assert [s for s in range(50) if edit.edits(place("self", s))] == list(range(20))
    assert all(edit.active(s, 50) == (s < 40) for s in range(50))
    assert edit.edits(place("self", 0, grid=(32, 32))) and not edit.edits(place("self", 0, grid=(32, 33)))


def test_swap_of_two_tokens_by_hand():
    mapper = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    source = torch.tensor([0.3, 0.7]).view(1, 1, 1, 2)
    own = torch.tensor([0.2, 0.2, 0.6]).view(1, 1, 1, 3)
    edited = swap(mapper).cross_map(place("cross", 0), own, {"source": source})
    assert torch.allclose(edited.flatten(), torch.tensor([0.3, 0.35, 0.35]))


def test_swap_puts_the_sources_map_on_the_targets_values():
    own, source = QKV(*torch.randn(3, 1, 4, 8)), QKV(*torch.randn(3, 1, 4, 8))
    edited = swap(torch.eye(77)).self_attention(place("self", 0), own, {"source": source})
    assert edited.q is source.q and edited.k is source.k and edited.v is own.v
