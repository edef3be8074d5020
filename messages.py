"""What the pack says: every text on its way to an error, a log or a node goes through here. Plain Python."""

import contextlib
import re

QUOTE, WHOLE = 200, 1200  # letters that are kept of what is quoted, and of a whole text
GAP = " ... "


def legible(text):
    """``text`` as it may leave the pack: what UTF-8 cannot hold, such as half an emoji or a stray byte of a file name,
    and line ends in what is quoted, written as their escapes, and the middle of what is too long left out.

    ComfyUI's log takes UTF-8 alone, and the thread that runs prompts ends for good at a letter that it cannot hold.
    """
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return _cut(re.sub(r'"([^"]*)"', lambda quote: f'"{_cut(_on_one_line(quote[1]), QUOTE)}"', text), WHOLE)


def _on_one_line(text):
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: ascii(found[0])[1:-1], text)


def _cut(text, most):
    # What a sentence asks for stands at its end. What comes here twice is cut once.
    half = (most - len(GAP)) // 2
    return text if len(text) <= most else text[:half] + GAP + text[-half:]


@contextlib.contextmanager
def legible_errors():
    """Makes the texts of an exception that passes through legible, and of those behind it, which the log holds too."""
    try:
        yield
    except Exception as problem:
        while problem is not None:
            problem.args = tuple(legible(one) if isinstance(one, str) else one for one in problem.args)
            problem = problem.__cause__ or problem.__context__
        raise
