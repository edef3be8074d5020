"""Words, the tokens they are made of, and the map that carries attention from one prompt's words to another's."""

from dataclasses import dataclass
from difflib import SequenceMatcher

import torch

CHUNK = 77  # CLIP reads a prompt in pieces of 77 tokens, each with its own start, end and padding


@dataclass(frozen=True)
class Word:
    """A word of a prompt and the positions of its tokens in the text embedding."""

    text: str
    positions: tuple


@dataclass(frozen=True)
class Tokens:
    """A tokenized prompt: its words in order, and how many chunks of 77 tokens it fills."""

    prompt: str
    words: tuple
    chunks: int

    @property
    def length(self):
        return CHUNK * self.chunks

    def find(self, word):
        """The positions of every occurrence of a word (or of several words in a row), one tuple each.

        Raises ValueError when the prompt does not hold it.
        """
        wanted = word.lower().split()
        texts = [w.text for w in self.words]
        found = [
            tuple(p for w in self.words[i : i + len(wanted)] for p in w.positions)
            for i in range(len(texts) - len(wanted) + 1)
            if wanted and texts[i : i + len(wanted)] == wanted
        ]
        if not found:
            raise ValueError(
                f'The word "{word}" is not in the prompt "{self.prompt}", whose words are: {", ".join(texts)}. '
                "Change the word or the prompt on the Attune node."
            )
        return found


def group_words(prompt, chunks):
    """Groups token pieces into words.

    ``chunks`` holds, for each chunk, the text pieces between its start and its end token in order; a piece that
    ends a word ends in "</w>" as in CLIP's vocabulary. A word cut by a chunk's border goes on in the next.
    """
    words, text, positions = [], "", ()
    for number, pieces in enumerate(chunks):
        for index, piece in enumerate(pieces):
            text += piece.removesuffix("</w>")
            positions += (CHUNK * number + 1 + index,)
            if piece.endswith("</w>"):
                words.append(Word(text, positions))
                text, positions = "", ()
    if positions:
        words.append(Word(text, positions))
    return Tokens(prompt, tuple(words), len(chunks))


def check_same_count(source, target):
    """Raises ValueError when the prompts have different numbers of words: then words were added or taken away."""
    ours, theirs = [w.text for w in source.words], [w.text for w in target.words]
    if len(ours) == len(theirs):
        return
    changes = [
        f'"{" ".join(ours[a:b])}" -> "{" ".join(theirs[c:d])}"'
        for kind, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    raise ValueError(
        f"The source prompt has {len(ours)} words and the target prompt {len(theirs)} ({', '.join(changes)}), but a "
        "word swap needs one word for each word; write as many words in both prompts of Attune Prompt Swap."
    )


def _frame(tokens, chunk, chunks):
    """Positions of a chunk's end and padding; the last of ``chunks`` takes in the frames of all that follow it."""
    last = tokens.chunks if chunk == chunks - 1 else chunk + 1
    taken = {p for w in tokens.words for p in w.positions}
    return [p for p in range(CHUNK * chunk + 1, CHUNK * last) if p not in taken]


def _share(mapper, ours, theirs):
    """Lets ``theirs`` read ``ours`` one to one as far as both reach; the last of the shorter takes the rest.

    Every source column is handed out exactly once in total, so no attention is lost or doubled.
    """
    pairs = max(len(ours), len(theirs))
    shares = [theirs[min(i, len(theirs) - 1)] for i in range(pairs)]
    reads = [ours[min(i, len(ours) - 1)] for i in range(pairs)]
    for s, t in zip(reads, shares, strict=True):
        mapper[s, t] = 1 / reads.count(s)


def swap_map(source, target):
    """The (T_source, T_target) matrix that turns the source prompt's maps into the target's (Prompt-to-Prompt 3.2).

    Words stand for words in order. A swapped word with another number of tokens spreads its attention: every source
    token gives 1/n to each of the target word's n tokens, so the word's attention stays what it was. The reference
    code counts all that follows such a word from the wrong place; this map does not. Start, end and padding stand
    for themselves, chunk by chunk; where one prompt has more chunks, its last ones share with the other's last.

    Raises ValueError when the numbers of words differ.
    """
    check_same_count(source, target)
    mapper = torch.zeros(source.length, target.length)
    for ours, theirs in zip(source.words, target.words, strict=True):
        if len(ours.positions) == len(theirs.positions):
            mapper[list(ours.positions), list(theirs.positions)] = 1
        else:
            for s in ours.positions:
                mapper[s, list(theirs.positions)] = 1 / len(theirs.positions)
    chunks = min(source.chunks, target.chunks)
    for chunk in range(chunks):
        mapper[CHUNK * chunk, CHUNK * chunk] = 1
        _share(mapper, _frame(source, chunk, chunks), _frame(target, chunk, chunks))
    return mapper
