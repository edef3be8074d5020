"""What may leave the pack in an error, a log or on a node."""

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attune.messages import QUOTE, WHOLE, legible, legible_errors

LONG = "word " * 20000
EVERY_LETTER = st.characters(exclude_categories=())  # halves of letters, too


def test_what_utf_8_cannot_hold_is_escaped():
    assert legible("a \ud83d and \udcff") == r"a \ud83d and \udcff"
    assert legible("caf\u00e9 \U0001f34e") == "caf\u00e9 \U0001f34e"


def test_what_is_quoted_stays_on_one_line():
    said = legible('The prompt is "a\n\x1b[31mcat\u2028",\nand more.')
    assert said == r'The prompt is "a\n\x1b[31mcat\u2028",' + "\nand more."


def test_long_quotes_lose_their_middle_and_the_sentence_stays():
    said = legible(f'The word "cat" is not in the prompt "{LONG}end"; change "it".')
    assert said.startswith('The word "cat" is not in the prompt "word word')
    assert said.endswith('word end"; change "it".')
    assert " ... " in said and len(said) < QUOTE + 100
    between = '"cat"' + " of the pack's own words" * 20 + ' "dog"'
    assert legible(between) == between
    assert legible(said) == said, "an error passes the sampler's and the node's"


def test_a_long_text_keeps_its_beginning_and_its_end():
    said = legible(f"The words are: {LONG}; choose one in the node.")
    assert said.startswith("The words are: word") and said.endswith("; choose one in the node.") and len(said) <= WHOLE


@given(st.text(EVERY_LETTER | st.sampled_from('"\n\ud83d'), max_size=50).map(lambda text: text * 60))
def test_whatever_comes_is_short_and_utf_8(text):
    assert len(legible(text)) <= WHOLE and legible(text).encode("utf-8").decode("utf-8") == legible(text)


@pytest.mark.parametrize("cause", [None, OSError(f"\udcff{LONG}"), FileNotFoundError(2, "No such file", "\udcff")])
def test_the_log_of_an_error_is_legible(cause):
    """The log holds whatever stands behind an error, too."""
    with pytest.raises(ValueError) as error, legible_errors():
        try:
            raise RuntimeError(f"\ud83d{LONG}")
        except RuntimeError:
            said = f'There is no "\ud83d{LONG}".'
            if cause is None:
                raise ValueError(said)  # noqa: B904
            raise ValueError(said) from cause
    log = "".join(traceback.format_exception(error.value))
    assert len(log.encode("utf-8")) < 4 * WHOLE and r'ValueError: There is no "\ud83dword' in log
