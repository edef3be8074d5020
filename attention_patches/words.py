"""Words, the tokens they are made of, and what users write about words in a line of text."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher

CHUNK = 77  # CLIP reads a prompt in pieces of 77 tokens, each with its own start, end and padding
START, END, PADDING = "<start>", "<end>", "<padding>"  # what users write for these
# Letters that only look like another: Cyrillic and Greek ones, quotation marks, dashes. CLIP tells them apart.
LOOKS = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u03bf\u03bd\u2018\u2019\u02bc\u201c\u201d\u2010\u2012"
    "\u2013\u2014\u2212",
    "aeopcyxijsov'''\"\"-----",
)


@dataclass(frozen=True)
class Word:
    """A word of a prompt, the positions of its tokens in the text embedding, and what tells one token from another."""

    text: str
    positions: tuple
    keys: tuple


ON_THE_NODE = "the word or the prompt on the Attune node"


def cut_at_spaces(text):
    """The words of a text in small letters, as far as they can be told without a tokenizer."""
    return text.lower().split()


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt: its words in order, and how many chunks of 77 tokens it fills.

    ``cut`` gives the words, as texts, that the same tokenizer makes of another text, so that a word is found however
    it is written: with a weight, escaped, in capitals, with composed or decomposed accents.
    """

    prompt: str
    words: tuple
    chunks: int
    cut: Callable = field(default=cut_at_spaces, compare=False)

    @property
    def length(self):
        return CHUNK * self.chunks

    @property
    def keys(self):
        """For every position that belongs to a word, in order: (position, what tells its token from others)."""
        return [pair for w in self.words for pair in zip(w.positions, w.keys, strict=True)]

    def between_spaces(self):
        """The same prompt with the words as they stand between spaces, such as "t-shirt" in one; None where they cannot
        be told apart, as where brackets weigh several words at once."""
        words, left = [], list(self.words)
        for part in self.prompt.split():
            read = self.cut(part)
            mine, left = left[: len(read)], left[len(read) :]
            if [w.text.lower() for w in mine] != [text.lower() for text in read]:
                return None
            if mine:
                positions, keys = (tuple(one for w in mine for one in getattr(w, of)) for of in ("positions", "keys"))
                words.append(Word("".join(w.text for w in mine), positions, keys))
        return None if left else replace(self, words=tuple(words))

    def find(self, word, where=ON_THE_NODE):
        """The positions of every occurrence of a word (or of several words in a row), one tuple each.

        Spaces do not matter, since a tokenizer also cuts at hyphens and apostrophes. Raises ValueError when the prompt
        does not hold it; ``where`` says what to change then.
        """
        found = self._occurrences(word)
        if not found:
            why = self._why(word)
            raise ValueError(f'The word "{word}" is not in the prompt "{self.prompt}", {why}; change {where}.')
        return found

    def _written(self, word):
        """A word as the prompt's words write it, without spaces. Of an embedding that is not there nothing is left."""
        return "".join(self.cut(word) or word.split()).lower()

    def _occurrences(self, word):
        runs = _runs(self._written(word), [w.text.lower() for w in self.words])
        return [tuple(p for w in self.words[i:j] for p in w.positions) for i, j in runs]

    def _why(self, word):
        """What the prompt holds instead of a word, as the end of a sentence."""
        written, texts = self._written(word), [w.text.lower() for w in self.words]
        if not self.cut(word):
            return "since the CLIP reads nothing of it (an embedding that ComfyUI does not find is nothing, too)"
        for i, j in _runs(_look(written), [_look(text) for text in texts]):
            ours, theirs = _apart(written, "".join(texts[i:j]))
            return f"which holds one that only looks like it: {ours} in the word, {theirs} in the prompt"
        return f"whose words are: {', '.join(w.text for w in self.words)}"

    def find_any(self, word, where=ON_THE_NODE):
        """As :meth:`find`, and also "<start>", "<end>" and "<padding>": the tokens around the words, of all chunks in
        one tuple. What the prompt itself holds goes first.

        CLIP's padding is its end token over and over; MaSaFusion's figure 10 draws both as "<|endoftext|>". Raises
        ValueError, too, for the padding of a prompt that leaves no room for any.
        """
        name = word.strip().lower()
        if name not in (START, END, PADDING) or self.holds(word):
            return self.find(word, where)
        found = self._around()[name]
        if not found:
            raise ValueError(
                f"{PADDING} is asked for, but the prompt fills all {self.length} text tokens and leaves none for it; "
                f"change {where}."
            )
        return [found]

    def _around(self):
        """The positions of the tokens that belong to no word, by their names."""
        taken, found = {p for word in self.words for p in word.positions}, {START: (), END: (), PADDING: ()}
        for first in range(0, self.length, CHUNK):
            end = 1 + max((p for p in taken if first < p < first + CHUNK), default=first)
            found[START] += (first,)
            found[END] += (end,)
            found[PADDING] += tuple(range(end + 1, first + CHUNK))
        return found

    def positions(self, words, where=ON_THE_NODE):
        """The positions of all occurrences of all ``words``, as one tuple, each once. Raises ValueError as
        :meth:`find`."""
        return tuple(dict.fromkeys(p for word in words for found in self.find(word, where) for p in found))

    def holds(self, word):
        """Whether the prompt holds a word."""
        return bool(self._occurrences(word))

    def count(self, word):
        """How many times the prompt holds a word."""
        return len(self._occurrences(word))


def _runs(wanted, texts):
    """(start, end) of every run of ``texts`` that is ``wanted`` when it is put together."""
    for i in range(len(texts)):
        run = ""
        for j in range(i, len(texts)):
            run += texts[j]
            if wanted and run == wanted:
                yield i, j + 1
            if len(run) >= len(wanted):
                break


def _look(text):
    """A text as the eye reads it: without accents, unseen letters, and ways of writing a letter."""
    plain = unicodedata.normalize("NFKD", text).casefold().translate(LOOKS)
    return "".join(letter for letter in plain if unicodedata.category(letter)[0] not in "MCZ")


def _apart(*texts):
    """The letters in which two texts differ, as code points such as "U+0441", of either; at most eight."""
    texts = [text[:100] for text in texts]
    changes = [c for c in SequenceMatcher(None, *texts, autojunk=False).get_opcodes() if c[0] != "equal"]
    ours = "".join(texts[0][i:j] for _, i, j, _, _ in changes)
    theirs = "".join(texts[1][i:j] for _, _, _, i, j in changes)
    return [" ".join(f"U+{ord(letter):04X}" for letter in one[:8]) or "nothing" for one in (ours, theirs)]


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


# What parts a list: commas, semicolons and line ends, also as they are typed in Chinese and Japanese.
MARK = re.compile(r"\\[()]|[(),;\n\uff0c\u3001\uff1b]")


BRACES = str.maketrans("\uff5b\uff5d", "{}")


def read_list(text):
    """The words of a line of text: what stands between commas, semicolons or line ends outside brackets."""
    ends, opened = [], []
    for mark in MARK.finditer(text):
        if mark[0] == "(":
            opened.append(len(ends))
        elif mark[0] == ")":
            del ends[opened.pop() if opened else len(ends) :]
        elif mark[0][0] != "\\":
            ends.append(mark.start())
    starts = [0, *(end + 1 for end in ends)]
    parts = [text[start:end].strip() for start, end in zip(starts, [*ends, len(text)], strict=True)]
    return [part for part in parts if part]


def _read_pairs(text, read, what, where):
    """``word: value`` pairs, as (word, value). Raises ValueError for what is no such pair."""
    pairs = []
    for part in read_list(text):
        colon = max(part.rfind(":"), part.rfind("\uff1a"))
        word, value = part[: max(colon, 0)].strip(), part[colon + 1 :]
        try:
            if not word:
                raise ValueError
            # Digits, points and dashes as they are typed in Chinese and Japanese, too.
            pairs.append((word, read(unicodedata.normalize("NFKC", value).translate(LOOKS).strip())))
        except ValueError:
            point = re.search(r"(\d)[,\uff0c](\d)", text)
            hint = f" (write {point[1]}.{point[2]} for {point[0]})" if point else ""
            raise ValueError(f'"{part}" is not {what}{hint}; correct {where}.') from None
    return pairs


def _number(text):
    number = float(text)
    if not abs(number) < 1e6:  # nan and inf, too
        raise ValueError
    return number


def read_factors(text, where="it on the Attune node"):
    """(word, factor) pairs of "red: 2, circle: -0.5". Raises ValueError for what is none; ``where`` says what to
    correct then."""
    return _read_pairs(text, _number, 'a word and its factor, such as "red: 2"', where)


def read_stretches(text, where="it on the Attune node"):
    """(word, (start, end)) pairs of "red: 0.4, circle: 0.2-0.6", shares of the steps; one number is the end.

    Raises ValueError for what is none; ``where`` says what to correct then.
    """

    def read(value):
        start, dash, end = value.rpartition("-")
        return (_number(start) if dash else 0.0), _number(end)

    return _read_pairs(text, read, 'a word and its share of the steps, such as "red: 0.4" or "red: 0.1-0.6"', where)


def read_numbers(text, where="it on the Attune node", start=0):
    """The numbers of "4-14" or "4, 6-9", which count from ``start``, as numbers from 0; None for no text. Raises
    ValueError; ``where`` says what to change then."""
    if not text.strip():
        return None
    numbers = set()
    for part in re.split(r"[,\s]+", text.strip().strip(",")):
        found = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (-1, -1)
        if not start <= first <= last:
            raise ValueError(
                f'"{text}" is no list of numbers from {start} on and stretches of them, such as "4-14" or "4, 6-9"; '
                f"change {where}."
            )
        numbers |= set(range(first - start, last - start + 1))
    return frozenset(numbers)


def read_layers(text, where="it on the Attune node"):
    """Layer numbers from 0 of "4-14" or "4, 6-9", which count from 1; as :func:`read_numbers`."""
    return read_numbers(text, where, start=1)


def read_braces(text, where="the Attune node"):
    """The text of "a {cat} and a {dog}" without its braces, and (what stood in them, where it starts) in order.

    Raises ValueError for braces that do not close, are empty, or stand in others, and where there are none; ``where``
    says where to change that.
    """
    plain, marked, start = "", [], None
    for letter in text.translate(BRACES):
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
    if not set(text.translate(BRACES)) & set("{}"):
        raise ValueError(
            f'The prompt "{text}" marks no noun, but at least one is learned; put each in braces, such as "a {{cat}} '
            f'and a {{dog}}", in {where}.'
        )
    raise ValueError(
        f'The braces in the prompt "{text}" do not match; put each noun in a pair of its own, such as "a {{cat}} and a '
        f'{{dog}}", in {where}.'
    )
