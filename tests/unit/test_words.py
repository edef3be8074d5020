import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attune.attention_patches.words import CHUNK, group_words, swap_map


def tokens(*words):
    """A one-chunk prompt of words written as their pieces: "a", "sq|ui|rrel"."""
    pieces = [p for w in words for p in (w + "</w>").split("|")]
    return group_words(" ".join(w.replace("|", "") for w in words), [pieces])


def test_pieces_become_words():
    read = tokens("a", "squ|irr|el", "on", "grass")
    assert [w.text for w in read.words] == ["a", "squirrel", "on", "grass"]
    assert [w.positions for w in read.words] == [(1,), (2, 3, 4), (5,), (6,)]
    assert read.length == CHUNK


def test_a_word_is_found_wherever_it_stands():
    read = tokens("a", "cat", "and", "a", "c|at")
    assert read.find("cat") == [(2,), (5, 6)]
    assert read.find("a cat") == [(1, 2), (4, 5, 6)]


def test_an_unknown_word_is_named_with_the_words_there_are():
    with pytest.raises(ValueError, match='"dog" is not in the prompt "a cat", whose words are: a, cat'):
        tokens("a", "cat").find("dog")


def test_second_chunk_counts_on():
    read = group_words("x", [["a</w>"] * 75, ["b</w>"]])
    assert read.words[-1].positions == (78,)
    assert read.length == 154


def test_added_words_are_refused_by_name():
    with pytest.raises(ValueError, match='2 words and the target prompt 3 .*"" -> "red"'):
        swap_map(tokens("a", "cat"), tokens("a", "red", "cat"))


def test_equal_pieces_map_one_to_one():
    mapper = swap_map(tokens("a", "cat", "sat"), tokens("a", "dog", "sat"))
    assert torch.equal(mapper, torch.eye(CHUNK))


def test_more_pieces_share_and_what_follows_stays_aligned():
    # "a cat sat" -> "a ti|ger sat": the reference code lets "sat" read what follows "sat".
    mapper = swap_map(tokens("a", "cat", "sat"), tokens("a", "ti|ger", "sat"))
    assert mapper[2, 2] == mapper[2, 3] == 0.5
    assert mapper[3, 4] == 1 and mapper[3].sum() == 1
    assert mapper[4, 5] == 1  # the end token
    assert mapper[75, 76] + mapper[76, 76] == 2  # one padding column fewer: the last takes what is left


def test_fewer_pieces_take_all():
    mapper = swap_map(tokens("ti|ger", "sat"), tokens("cat", "sat"))
    assert mapper[1, 1] == mapper[2, 1] == 1
    assert mapper[3, 2] == 1


def test_two_swaps_before_a_shared_word():
    mapper = swap_map(tokens("r|ed", "cat", "sat"), tokens("blue", "ti|g|er", "sat"))
    assert mapper[1, 1] == mapper[2, 1] == 1
    assert torch.allclose(mapper[3, 2:5], torch.full((3,), 1 / 3))
    assert mapper[4, 5] == 1


word = st.lists(st.sampled_from(["ab", "cd", "ef"]), min_size=1, max_size=4).map("|".join)


@given(st.lists(st.tuples(word, word), min_size=0, max_size=12))
def test_no_attention_is_lost_or_doubled(pairs):
    source, target = tokens(*(a for a, _ in pairs)), tokens(*(b for _, b in pairs))
    mapper = swap_map(source, target)
    assert torch.allclose(mapper.sum(1), torch.ones(CHUNK), atol=1e-5)
    assert (mapper.sum(0) > 0).all()
    for a, b in zip(source.words, target.words, strict=True):
        assert torch.isclose(
            mapper[list(a.positions)][:, list(b.positions)].sum(), torch.tensor(float(len(a.positions)))
        )


@pytest.mark.parametrize("longer", ["source", "target"])
def test_one_prompt_in_more_chunks(longer):
    short = group_words("x", [["a</w>"] * 75])
    long = group_words("y", [["a</w>"] * 74 + ["b"], ["c</w>"]])
    assert len(short.words) == len(long.words)
    mapper = swap_map(short, long) if longer == "target" else swap_map(long, short)
    assert mapper.shape == ((77, 154) if longer == "target" else (154, 77))
    assert torch.allclose(mapper.sum(1), torch.ones(len(mapper)))
    assert (mapper.sum(0) > 0).all()
    if longer == "target":
        assert mapper[75, [75, 78]].tolist() == [0.5, 0.5]
