import pytest
import torch
from torch.nn import functional as F

from attune.attention_patches.controller import Controller
from attune.attention_patches.embedding_control import control
from attune.attention_patches.local_blend import LocalBlend, blend, changed
from attune.attention_patches.prompt_to_prompt import PromptToPrompt
from attune.attention_patches.reweight import Reweight
from attune.attention_patches.values import QKV, Place, Window, apply_map, attention_map, split_heads
from attune.attention_patches.watch import WatchedWords


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
    assert not base.edits(place("self", 0)) and not base.edits(place("cross", 0))
    assert base.self_attention(place("self", 0), own, {}) is own
    assert base.cross_map(place("cross", 0), own.q, {}) is own.q


def test_no_two_methods_are_one_however_alike():
    """A run keeps things by controller and by blend; two that compare equal would lose the second in silence."""
    found, todo = [LocalBlend], [Controller]
    while todo:
        one = todo.pop()
        found.append(one)
        todo += one.__subclasses__()
    assert len(found) > 8
    for one in found:
        assert one.__eq__ is object.__eq__ and one.__hash__ is object.__hash__, one
    base = Controller(prompt="x", tokens=77)
    assert base != Controller(prompt="x", tokens=77)


def swap(mapper, cross=(0, 0.8), self_=(0, 0.4), limit=1024, injected=None, word_windows=()):
    injected = torch.ones(mapper.shape[1], dtype=torch.bool) if injected is None else torch.tensor(injected)
    return PromptToPrompt(
        prompt="x", tokens=mapper.shape[1], mapper=mapper, injected=injected, cross=Window(*cross),
        self_=Window(*self_), word_windows=word_windows, token_limit=limit,
    )  # fmt: skip


def test_swap_acts_where_the_paper_says():
    edit = swap(torch.eye(77))
    # Prompt-to-Prompt's table: of 50 steps, cross until 39 and self until 19.
    assert [s for s in range(50) if edit.edits(place("cross", s))] == list(range(40))
    assert [s for s in range(50) if edit.edits(place("self", s))] == list(range(20))
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


def test_a_words_own_window_takes_the_place_of_the_common_one():
    edit = swap(torch.eye(4), word_windows=(((1, 2), Window(0.5, 1.0)),))
    assert [edit.columns(s, 50).tolist() for s in (0, 30, 45)] == [
        [True, False, False, True], [True] * 4, [False, True, True, False],
    ]  # fmt: skip
    assert all(edit.edits(place("cross", s)) for s in range(50))
    own, source = torch.rand(1, 1, 3, 4), torch.rand(1, 1, 3, 4)
    early = edit.cross_map(place("cross", 0), own, {"source": source})
    assert torch.equal(early[..., [0, 3]], source[..., [0, 3]]) and torch.equal(early[..., 1:3], own[..., 1:3])
    assert edit.reads_own_map(place("cross", 0)) and not edit.reads_own_map(place("cross", 30))
    assert torch.equal(edit.cross_map(place("cross", 30), None, {"source": source}), source)


def test_columns_that_are_left_out_are_the_targets_own():
    edit = swap(torch.eye(3), injected=[False, True, False])
    own, source = torch.rand(1, 1, 2, 3), torch.rand(1, 1, 2, 3)
    mixed = edit.cross_map(place("cross", 0), own, {"source": source})
    assert torch.equal(mixed[..., 1], source[..., 1]) and torch.equal(mixed[..., [0, 2]], own[..., [0, 2]])


def test_reweight_scales_and_does_not_renormalise():
    edit = Reweight(prompt="x", tokens=3, factors=torch.tensor([1.0, -2.0, 0.0]), cross=Window(0, 0.8))
    p = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 1, 3)
    assert torch.allclose(edit.cross_map(place("cross", 0), p, {}).flatten(), torch.tensor([0.5, -0.6, 0.0]))
    assert [s for s in range(50) if edit.edits(place("cross", s))] == list(range(40))
    assert not edit.edits(place("self", 0))
    neutral = Reweight(prompt="x", tokens=2, factors=torch.ones(2), cross=Window(0, 1))
    assert not neutral.edits(place("cross", 0))


def test_a_word_may_be_weighed_in_a_stretch_of_its_own():
    factors, own = torch.tensor([1.0, -2.0, 3.0]), (((2,), Window(0.5, 1)),)
    edit = Reweight(prompt="x", tokens=3, factors=factors, cross=Window(0, 0.2), word_windows=own)
    # Rows of a table of 11 for 10 steps, as the authors' code has it: 0 and 1, and 5 to 9.
    seen = [edit.factors_at(step, 10).tolist() for step in range(10)]
    assert seen == [[1, -2, 1]] * 2 + [[1, 1, 1]] * 3 + [[1, 1, 3]] * 5
    assert [step for step in range(10) if edit.edits(place("cross", step, 10))] == [0, 1, 5, 6, 7, 8, 9]


def test_layers_can_be_named():
    named = PromptToPrompt(
        prompt="x", tokens=77, mapper=torch.eye(77), injected=torch.ones(77, dtype=torch.bool), cross=Window(0, 1),
        self_=Window(0, 1), token_limit=0, cross_layers=frozenset({1}), self_layers=frozenset({2, 3}),
    )  # fmt: skip

    def acts(kind):
        return [n for n in range(5) if named.edits(Place(kind, ("input", 1), 0, (16, 16), 0, 50, n))]

    assert acts("cross") == [1] and acts("self") == [2, 3]  # whatever the token limit


def test_a_blend_may_have_a_threshold_of_its_own_outside():
    maps = torch.zeros(4, 1, 4, 4)
    maps[1] = 1.0  # the target's word inside is everywhere
    maps[3] = torch.linspace(0, 1, 16).view(1, 4, 4)
    words = WatchedWords(target_inside=(1,), target_outside=(2,))

    def kept(**more):
        one = LocalBlend(prompt="x", tokens=77, words=words, threshold=0.3, **more)
        return int(one.weight(maps, (4, 4)).sum())

    assert (kept(), kept(outside_threshold=0.3), kept(outside_threshold=0.8)) == (5, 5, 13)


def test_embedding_control_by_hand():
    source, target = torch.arange(4.0).view(1, 4, 1), 10 + torch.arange(5.0).view(1, 5, 1)
    mixed = control(source, target, torch.tensor([0, 1, -1, 2, 3]))
    assert mixed.flatten().tolist() == [0, 1, 12, 2, 3]
    assert target[0, 0] == 10


# ---- local blend ----------------------------------------------------------------------------------------------------


def blending(**settings):
    return LocalBlend(**{"prompt": "x", "tokens": 77, "words": WatchedWords((1,), (1,), (2,), (2,))} | settings)


def test_blend_starts_as_the_authors_code_does():
    assert [s for s in range(50) if blending().acts(s, 50)] == list(range(10, 50))
    assert not any(blending(start=1.0).acts(s, 50) for s in range(50)) and not blending(start=1.0).watch


def test_blend_words_read_their_columns():
    source, target = torch.rand(1, 6, 4), torch.rand(1, 6, 4)
    inside, edited, kept, nothing = WatchedWords((1, 2), (3,), (0,)).read(source, target)
    assert torch.equal(inside, source[..., 1] + source[..., 2]) and torch.equal(edited, target[..., 3])
    assert torch.equal(kept, source[..., 0]) and not nothing.any()


def test_blend_mask_by_hand():
    maps = torch.zeros(4, 1, 6, 6)
    maps[0, 0, 1, 1] = 1.0  # the source's word; grows by one token
    maps[1, 0, 4, 4] = 0.5  # the target's, measured by its own strongest
    maps[1, 0, 0, 5] = 0.1  # below the threshold
    maps[2, 0, 2, 2] = 1.0  # kept out, without growing
    mask = blending().weight(maps, (6, 6))[0, 0]
    true = torch.zeros(6, 6)
    true[0:3, 0:3] = 1
    true[3:6, 3:6] = 1
    true[2, 2] = 0
    assert torch.equal(mask, true)
    assert blending().weight(maps, (12, 12)).shape == (1, 1, 12, 12)


def test_blend_of_words_that_look_nowhere_keeps_the_source():
    assert not blending().weight(torch.zeros(4, 1, 4, 4), (4, 4)).any()


def test_blend_with_words_outside_alone():
    maps = torch.zeros(4, 1, 4, 4)
    maps[3, 0, 0] = 1.0
    mask = blending(words=WatchedWords((), (), (), (2,))).weight(maps, (4, 4))[0, 0]
    assert not mask[0].any() and mask[1:].all()


def test_a_mask_alone_and_with_words():
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 3:] = 1
    alone = blending(words=None, mask=mask).weight(None, (4, 4))[0, 0]
    assert alone[0].tolist() == [0, 0.5, 1, 1]  # by area
    maps = torch.zeros(4, 1, 4, 4)
    maps[0] = 1.0
    maps[2, 0, 0] = 1.0
    both = blending(mask=mask).weight(maps, (4, 4))[0, 0]
    assert not both[0].any() and both[1].tolist() == [0, 0.5, 1, 1]


def test_blend_lands_on_the_source():
    x, clean, source = torch.randn(3, 2, 4, 8, 8)
    sigma, lower = 2.0, 1.5
    weight = torch.zeros(1, 1, 8, 8)
    weight[..., 4:] = 1
    blended = blend(x, clean, source, weight, sigma, lower)
    assert torch.equal(blended[..., 4:], clean[..., 4:])
    euler = x + (x - blended) / sigma * (lower - sigma)
    assert torch.allclose(euler[..., :4], source[..., :4], atol=1e-5)
    last = blend(x, clean, source, weight, sigma, 0.0)
    assert torch.equal(last[..., :4], source[..., :4])


def test_changed_is_the_mask_of_the_last_step():
    source = torch.randn(1, 4, 6, 6)
    edited = source.repeat(2, 1, 1, 1) + 1e-6
    edited[1, 2, 3, 4] += 0.01
    mask = changed(edited, source)
    assert mask.shape == (2, 6, 6) and mask.sum() == 1 and mask[1, 3, 4] == 1
