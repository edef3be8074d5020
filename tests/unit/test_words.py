import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attune.attention_patches.alignment import align, refine_map, swap_map
from attune.attention_patches.words import (
    CHUNK,
    group_words,
    read_braces,
    read_factors,
    read_list,
    read_stretches,
    stands_alone,
)


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


def test_a_word_that_the_tokenizer_cuts_is_found_whole():
    read = tokens("a", "t", "-", "shirt", "of", "mother", "'s")
    assert read.find("T-shirt") == [(2, 3, 4)] and read.find("mother's") == [(6, 7)]
    assert read.positions(["a", "of"]) == (1, 5)
    assert read.holds("shirt") and read.holds("t-") and not read.holds("hat")


def test_a_learned_embedding_is_one_word():
    read = group_words("x", [["a</w>", "embedding:cat", "", "</w>", "embedding:dog", "</w>", "on</w>"]])
    assert [(w.text, w.positions) for w in read.words][1:3] == [("embedding:cat", (2, 3, 4)), ("embedding:dog", (5, 6))]
    assert read.find("embedding:Cat") == [(2, 3, 4)]
    keys = [key for _, key in read.keys]
    assert len(set(keys)) == len(keys)  # one's second vector is not the other's


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


def test_what_users_write_about_words():
    assert read_list(" red circle,\nstar,, ") == ["red circle", "star"]
    assert read_factors("red: 2, embedding:cat: -0.5\nstar:0") == [("red", 2), ("embedding:cat", -0.5), ("star", 0)]
    assert read_stretches("red: 0.4, star: 0.1-0.6") == [("red", (0, 0.4)), ("star", (0.1, 0.6))]


@pytest.mark.parametrize("text", ["red", "red: much", ": 2", "red: nan", "red: inf"])
def test_what_is_no_pair_is_quoted(text):
    with pytest.raises(ValueError, match="is not a word and its factor"):
        read_factors(text)
    with pytest.raises(ValueError, match="is not a word and its share"):
        read_stretches(text)


def test_nouns_in_braces():
    assert read_braces("a {cat} and a {dog}") == ("a cat and a dog", [("cat", 2), ("dog", 12)])
    assert read_braces("({cat}:1.2) {cat}s") == ("(cat:1.2) cats", [("cat", 1), ("cat", 10)])
    assert read_braces("{ red  cat\n}") == (" red  cat\n", [("red  cat", 0)])


@given(st.lists(st.tuples(st.booleans(), st.text("ab :,()", min_size=1)), min_size=1))
def test_what_stands_in_braces_is_found_where_it_stands(parts):
    text = "".join("{" + part + "}" if marked else part for marked, part in parts)
    wanted, plain = [], ""
    for marked, part in parts:
        if marked:
            wanted.append((part.strip(), len(plain)))
        plain += part
    if wanted and all(noun for noun, _ in wanted):
        assert read_braces(text) == (plain, wanted)
    else:
        with pytest.raises(ValueError, match="braces"):
            read_braces(text)


@pytest.mark.parametrize(
    "text", ["a {cat", "a cat}", "a {{cat}}", "a {cat} {", "{{cat}", "a {b {c} d", "{}", "{ }", "}{", "a {b {c} d}"]
)
def test_braces_that_do_not_match(text):
    with pytest.raises(ValueError) as error:
        read_braces(text)
    said = str(error.value)
    assert f'"{text}" do not match' in said and 'such as "a {cat} and a {dog}"' in said and said.endswith("node.")


@pytest.mark.parametrize("text", ["", "a cat"])
def test_a_prompt_without_braces(text):
    with pytest.raises(ValueError) as error:
        read_braces(text)
    said = str(error.value)
    assert f'"{text}" marks no noun' in said and 'such as "a {cat} and a {dog}"' in said and said.endswith("node.")


def test_a_noun_that_is_part_of_a_word():
    for text in ("a {cat}", "{cat}", "({cat}:1.2)", "a cat-{cat}", "a {cat}, red", "two {cats}", "a{ cat }b"):
        prompt, ((noun, start),) = read_braces(text)
        assert stands_alone(prompt, noun, start), text
    for text in ("two {cat}s", "a tom{cat}", "s{cat}ter", "the cat and the {cat}s"):
        prompt, ((noun, start),) = read_braces(text)
        assert not stands_alone(prompt, noun, start), text


def test_words_are_counted():
    read = tokens("a", "cat", "and", "a", "c|at", "on", "a", "cat", "-", "fish")
    assert [read.count(word) for word in ("cat", "a cat", "cat-fish", "fish", "dog", "")] == [3, 3, 1, 1, 0, 0]


def counterparts(source, target):
    found = align(source, target)
    return {t: int(found[t]) for t, _ in target.keys}


def test_added_words_have_no_counterpart():
    source, target = tokens("a", "cat", "sat"), tokens("a", "fl|uffy", "cat", "sat", "down")
    assert counterparts(source, target) == {1: 1, 2: -1, 3: -1, 4: 2, 5: 3, 6: -1}
    found = align(source, target)
    assert found[0] == 0 and found[7] == 4  # start and end
    assert found[8:].tolist() == list(range(8, CHUNK))  # padding stays where it is
    mapper = refine_map(source, target)
    assert mapper[4, 7] == 1 and mapper.sum(0)[[2, 3, 6]].eq(0).all() and mapper.sum(0).sum() == CHUNK - 3


def test_removed_words_leave_padding_without_a_counterpart():
    """The authors' code would let the two freed columns read the words that are gone."""
    found = align(tokens("a", "b|ig", "cat", "sat"), tokens("a", "cat"))
    assert found[:4].tolist() == [0, 1, 4, 6]
    assert found[4:7].tolist() == [-1] * 3 and found[7:].tolist() == list(range(7, CHUNK))


def test_a_swapped_word_has_no_counterpart_in_a_refinement():
    assert counterparts(tokens("a", "cat", "sat"), tokens("a", "dog", "sat")) == {1: 1, 2: -1, 3: 3}


@given(st.lists(word, max_size=8), st.lists(word, max_size=8))
def test_alignment_is_the_longest_common_run(ours, theirs):
    source, target = tokens(*ours), tokens(*theirs)
    pairs = [(int(s), t) for t, s in counterparts(source, target).items() if s >= 0]
    assert pairs == sorted(pairs) and len({s for s, _ in pairs}) == len(pairs)
    a, b = [k for _, k in source.keys], [k for _, k in target.keys]
    assert all(a[s - 1] == b[t - 1] for s, t in pairs)
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a)):
        for j in range(len(b)):
            longest[i + 1][j + 1] = longest[i][j] + 1 if a[i] == b[j] else max(longest[i][j + 1], longest[i + 1][j])
    assert len(pairs) == longest[-1][-1]


def test_alignment_over_chunks():
    source = group_words("x", [["a</w>"] * 75, ["b</w>"]])
    target = group_words("y", [["new</w>"] + ["a</w>"] * 74, ["a</w>", "b</w>"]])
    found = align(source, target)
    assert found[1] == -1 and found[2] == 1 and found[78] == 75 and found[79] == 78
    assert found[76] == 76 and found[77] == 77 and found[80] == 79  # both chunks' ends and the second's start
