"""Words, the tokens they are made of, and what users write about words in a line of text."""

import re
from dataclasses import dataclass

CHUNK = 77  # CLIP reads a prompt in pieces of 77 tokens, each with its own start, end and padding


@dataclass(frozen=True)
class Word:
    """A word of a prompt, the positions of its tokens in the text embedding, and what tells one token from another."""

    text: str
    positions: tuple
    keys: tuple


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt: its words in order, and how many chunks of 77 tokens it fills."""

    prompt: str
    words: tuple
    chunks: int

    @property
    def length(self):
        return CHUNK * self.chunks

    @property
    def keys(self):
        """For every position that belongs to a word, in order: (position, what tells its token from others)."""
        return [pair for w in self.words for pair in zip(w.positions, w.keys, strict=True)]

    def find(self, word):
        """The positions of every occurrence of a word (or of several words in a row), one tuple each.

        Spaces do not matter, since a tokenizer also cuts at hyphens and apostrophes. Raises ValueError when the prompt
        does not hold it.
        """
        found = self._occurrences(word)
        if not found:
            raise ValueError(
                f'The word "{word}" is not in the prompt "{self.prompt}", whose words are: '
                f"{', '.join(w.text for w in self.words)}; change the word or the prompt on the Attune node."
            )
        return found

    def _occurrences(self, word):
        wanted = "".join(word.lower().split())
        texts = [w.text.lower() for w in self.words]
        found = []
        for i in range(len(texts)):
            for j in range(i + 1, len(texts) + 1):
                run = "".join(texts[i:j])
                if wanted and run == wanted:
                    found.append(tuple(p for w in self.words[i:j] for p in w.positions))
                if len(run) >= len(wanted):
                    break
        return found

    def positions(self, words):
        """The positions of all occurrences of all ``words``, as one tuple. Raises ValueError as :meth:`find`."""
        return tuple(p for word in words for found in self.find(word) for p in found)

    def holds(self, word):
        """Whether the prompt holds a word."""
        return bool(self._occurrences(word))

    def count(self, word):
        """How many times the prompt holds a word."""
        return len(self._occurrences(word))


def group_words(prompt, chunks):
    """Groups token pieces into words.

    ``chunks`` holds, for each chunk, the text pieces between its start and its end token in order; a piece that
    ends a word ends in "</w>" as in CLIP's vocabulary. A word cut by a chunk's border goes on in the next.
    """
    words, text, positions, keys = [], "", (), ()
    for number, pieces in enumerate(chunks):
        for index, piece in enumerate(pieces):
            # A learned embedding's vectors have no letters of their own.
            keys += ((text, index) if piece in ("", "</w>") else piece,)
            text += piece.removesuffix("</w>")
            positions += (CHUNK * number + 1 + index,)
            if piece.endswith("</w>"):
                words.append(Word(text, positions, keys))
                text, positions, keys = "", (), ()
    if positions:
        words.append(Word(text, positions, keys))
    return Tokens(prompt, tuple(words), len(chunks))


# ---- what users write ---------------------------------------------------------------------------------------------


def read_list(text):
    """The words of a line of text: what stands between commas or line ends."""
    return [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]


def _read_pairs(text, read, what):
    """``word: value`` pairs, as (word, value). Raises ValueError for what is no such pair."""
    pairs = []
    for part in read_list(text):
        word, colon, value = part.rpartition(":")
        try:
            if not colon or not word.strip():
                raise ValueError
            pairs.append((word.strip(), read(value.strip())))
        except ValueError:
            raise ValueError(f'"{part}" is not {what}; correct it on the Attune node.') from None
    return pairs


def _number(text):
    number = float(text)
    if not abs(number) < 1e6:  # nan and inf, too
        raise ValueError
    return number


def read_factors(text):
    """(word, factor) pairs of "red: 2, circle: -0.5". Raises ValueError for what is none."""
    return _read_pairs(text, _number, 'a word and its factor, such as "red: 2"')


def read_stretches(text):
    """(word, (start, end)) pairs of "red: 0.4, circle: 0.2-0.6", shares of the steps; one number is the end.

    Raises ValueError for what is none.
    """

    def read(value):
        start, dash, end = value.rpartition("-")
        return (_number(start) if dash else 0.0), _number(end)

    return _read_pairs(text, read, 'a word and its share of the steps, such as "red: 0.4" or "red: 0.1-0.6"')


def read_braces(text):
    """The text of "a {cat} and a {dog}" without its braces, and (what stood in them, where it starts) in order.

    Raises ValueError for braces that do not close, are empty, or stand in others, and where there are none.
    """
    plain, marked, start = "", [], None
    for letter in text:
        if letter == "{" and start is None:
            start = len(plain)
        elif letter == "}" and start is not None and plain[start:].strip():
            marked.append((plain[start:].strip(), start))
            start = None
        elif letter in "{}":
            break
        else:
            plain += letter
    else:
        if start is None and marked:
            return plain, marked
    if not set(text) & set("{}"):
        raise ValueError(
            f'The prompt "{text}" marks no noun, but at least one is learned; put each in braces, such as "a {{cat}} '
            'and a {dog}", on the Attune node.'
        )
    raise ValueError(
        f'The braces in the prompt "{text}" do not match; put each noun in a pair of its own, such as "a {{cat}} and a '
        '{dog}", on the Attune node.'
    )


def stands_alone(prompt, noun, start):
    """Whether ``noun``, which stands in ``prompt`` from ``start`` on or behind spaces there, is not part of a word."""
    start = prompt.index(noun, start)
    end = start + len(noun)
    edges = prompt[max(0, start - 1) : start + 1], prompt[end - 1 : end + 1]
    return not any(len(edge) == 2 and edge.isalpha() for edge in edges)
