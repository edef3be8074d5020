import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attune.attention_patches.alignment import align, refine_map, same_count, shifted_words, swap_map
from attune.attention_patches.words import (
    CHUNK,
    group_words,
    read_braces,
    read_factors,
    read_list,
    read_stretches,
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


def test_a_word_is_what_the_tokenizer_makes_of_it():
    """Here one that takes brackets away and cuts at hyphens."""
    read = replace(tokens("a", "t", "-", "shirt", "red"), cut=lambda text: text.strip("()").replace("-", " - ").split())
    assert read.find("(red)") == read.find("((red") == [(5,)]
    assert read.find("(t-shirt)") == [(2, 3, 4)] and read.holds("(a)") and read.count("(shirt)") == 1
    with pytest.raises(ValueError, match=r'"\(\)" is not in .*, since the CLIP reads nothing of it.*; change me\.$'):
        read.find("()", "me")


def test_each_position_counts_once():
    read = tokens("ha", "ha", "ha", "red", "star")
    assert read.find("ha ha") == [(1, 2), (2, 3)]
    assert read.positions(["ha ha", "red star", "red"]) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("prompt, word, apart", [
    (("a", "\u0441ircle"), "circle", "U+0063 in the word, U+0441 in the prompt"),  # a Cyrillic letter
    (("mother", "\u2019", "s"), "mother's", "U+0027 in the word, U+2019 in the prompt"),
    (("r\u200bed",), "red", "nothing in the word, U+200B in the prompt"),
    (("red",), "\uff32ed", "U+FF52 in the word, U+0072 in the prompt"),
    (("\u03c3\u03bf\u03c3",), "\u03c3\u03bf\u03c2", "U+03C2 in the word, U+03C3 in the prompt"),  # the final sigma
    (("caf\u00e9",), "cafe", "U+0065 in the word, U+00E9 in the prompt"),
])  # fmt: skip
def test_words_that_only_look_alike_are_told_by_their_code_points(prompt, word, apart):
    with pytest.raises(ValueError) as error:
        tokens(*prompt).find(word)
    said = str(error.value)
    assert said.endswith(
        f", which holds one that only looks like it: {apart}; change the word or the prompt on the Attune node."
    )


def test_second_chunk_counts_on():
    read = group_words("x", [["a</w>"] * 75, ["b</w>"]])
    assert read.words[-1].positions == (78,)
    assert read.length == 154


def test_the_tokens_around_the_words_are_found_by_name():
    read = group_words("x", [["w</w>"] * 75, ["a</w>", "c|at</w>"]])
    assert read.find_any("<start>") == [(0, CHUNK)]
    assert read.find_any(" <End>") == [(76, CHUNK + 3)]
    assert read.find_any("<padding>") == [tuple(range(CHUNK + 4, 2 * CHUNK))]
    around = sum((read.find_any(name)[0] for name in ("<start>", "<end>", "<padding>")), ())
    assert sorted((*around, *(p for w in read.words for p in w.positions))) == list(range(2 * CHUNK))
    assert read.find_any("a") == read.find("a") and group_words("", [[]]).find_any("<end>") == [(1,)]


def test_what_the_prompt_itself_holds_goes_before_the_tokens_around_it():
    assert tokens("a", "<", "start", ">").find_any("<start>") == [(2, 3, 4)]


def test_a_prompt_that_leaves_no_room_for_padding():
    read = group_words("x", [["w</w>"] * 75])
    with pytest.raises(ValueError, match="fills all 77 text tokens .* change the words here."):
        read.find_any("<padding>", "the words here")
    with pytest.raises(ValueError, match='"<middle>" is not in the prompt'):
        read.find_any("<middle>")


def test_added_words_are_refused_by_name():
    with pytest.raises(ValueError, match='2 words and the target prompt 3 .*"" -> "red".* take Attune Prompt Refine'):
        swap_map(tokens("a", "cat"), tokens("a", "red", "cat"))


@pytest.mark.parametrize("source, target, at", [
    ("a t-shirt here", "a dress here", (2, 3, 4)),
    ("a 3d cat", "a flat cat", (2, 3)),
    ("the cat's hat", "the cat hat", (2, 3)),
    ("rock'n'roll music", "jazz music", (1, 2, 3, 4, 5)),
])  # fmt: skip
def test_words_count_between_spaces_where_clips_words_do_not_come_out_even(source, target, at):
    """As the authors' code counts. CLIP's own words are what it cuts at hyphens, apostrophes and digits."""

    def cut(text):
        return re.findall(r"'[sdmt]|[a-z]+|[0-9]|[^a-z0-9 ]+", text.lower())

    def read(text):
        return replace(tokens(*cut(text)), prompt=text, cut=cut)

    ours, theirs = same_count(read(source), read(target))
    assert [w.text for w in ours.words] == source.split() and [w.text for w in theirs.words] == target.split()
    mapper, place = swap_map(read(source), read(target)), at[0]
    assert (mapper[list(at), place] == 1).all()  # every token of the old word, for the one of the new
    after = ours.words[-1].positions[0], theirs.words[-1].positions[0]
    assert mapper[after] == 1 and mapper[:, after[1]].sum() == 1  # what follows reads its own place
    with pytest.raises(ValueError, match="words and the target prompt"):
        swap_map(read(source), read(f"{target} and so very many more of them"))


def test_words_are_not_told_apart_by_spaces_where_they_are_weighed_together():
    read = replace(tokens("a", "red", "cat"), prompt="a (red cat:1.2)", cut=lambda text: ["?"])
    assert read.between_spaces() is None


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


def test_lists_are_parted_as_people_type_them():
    assert read_list("red\uff0ccircle\u3001star\uff1bheart; sun") == ["red", "circle", "star", "heart", "sun"]
    assert read_factors("red\uff1a2\uff0c star \uff1a \uff0d\uff10\uff0e\uff15") == [("red", 2), ("star", -0.5)]
    assert read_stretches("red\uff1a0.1\u20130.6") == [("red", (0.1, 0.6))]


def test_brackets_keep_what_stands_in_them_together():
    assert read_list("(red, (old, big):1.2), circle") == ["(red, (old, big):1.2)", "circle"]
    assert read_list(r"\(red, blue\), :-(, star") == [r"\(red", r"blue\)", ":-(", "star"]
    assert read_list("star), (red") == ["star)", "(red"]
    assert read_factors("(red:1.3): 2, (a, b)\uff1a1") == [("(red:1.3)", 2), ("(a, b)", 1)]


@given(st.text("ab(),:\\\n", max_size=40))
def test_nothing_but_marks_between_words_is_lost(text):
    parts, plain = read_list(text), text.replace("\n", "").replace(",", "")
    assert "".join(parts).replace("\n", "").replace(",", "") == plain
    assert all(part.count("(") >= 1 for part in parts if "," in part)


@pytest.mark.parametrize("text", ["red: 1,5", "red: 1\uff0c5, star: 2", "star: 2, red: 1,5"])
def test_a_number_with_a_comma_is_told_to_have_a_point(text):
    for read in (read_factors, read_stretches):
        with pytest.raises(ValueError, match=r'^"5" is not .* \(write 1\.5 for 1.5\); correct weights here\.$'):
            read(text, "weights here")


@pytest.mark.parametrize("text", ["red", "red: much", ": 2", "red: nan", "red: inf"])
def test_what_is_no_pair_is_quoted(text):
    with pytest.raises(ValueError, match="is not a word and its factor"):
        read_factors(text)
    with pytest.raises(ValueError, match="is not a word and its share"):
        read_stretches(text)


def test_nouns_in_braces():
    assert read_braces("a {cat} and a {dog}") == ("a cat and a dog", [("cat", 2), ("dog", 12)])
    assert read_braces("({cat}:1.2) {cat}s") == ("(cat:1.2) cats", [("cat", 1), ("cat", 10)])
    assert read_braces("a \uff5bcat\uff5d") == ("a cat", [("cat", 2)])
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


@pytest.mark.parametrize("source, target, shifted", [
    ("a red circle on grass", "a circle on dark grass", "circle<red on<circle"),
    ("a striped red dog and a cat", "a red dog and a dotted cat", "red<striped dog<red and<dog a<and"),
    ("a cat , asleep", "a dog asleep now", "asleep<,"),
    ("a red circle", "a blue circle", ""),
    ("a cat and a dog", "a dog and a cat", ""),  # two words change places, and that is meant
    ("red and blue balls", "blue and red balls", ""),
    ("a red star", "two blue suns", ""),
    ("", "", ""),
])  # fmt: skip
def test_a_swap_with_a_word_taken_away_and_one_added_shifts_those_between(source, target, shifted):
    found = shifted_words(*(tokens(*text.split()) for text in (source, target)))
    assert " ".join(f"{theirs.text}<{ours.text}" for theirs, ours in found) == shifted


@given(st.lists(st.tuples(word, word), max_size=10))
def test_words_that_a_swap_shifts_read_another_word_and_have_their_own(pairs):
    source, target = tokens(*(a for a, _ in pairs)), tokens(*(b for _, b in pairs))
    mapper, found = swap_map(source, target), align(source, target)
    for theirs, ours in shifted_words(source, target):
        assert mapper[list(ours.positions)][:, list(theirs.positions)].sum() > 0 and ours.keys != theirs.keys
        own = {int(found[position]) for position in theirs.positions}
        (same,) = (word for word in source.words if set(word.positions) == own)
        assert same.keys == theirs.keys and same.positions != ours.positions
