"""Which token of the source prompt stands for which of the target's: word by word for a swap, and freely."""

from difflib import SequenceMatcher

import torch

from .words import CHUNK


def same_count(source, target):
    """The two prompts' :class:`words.Tokens` with as many words in both: CLIP's, or where those differ in number the
    words between spaces, as the authors' code counts them ("t-shirt" is three of CLIP's and one of those).

    Raises ValueError where neither come out even: then words were added or taken away."""
    ours, theirs = source.words, target.words
    if len(ours) == len(theirs):
        return source, target
    between_spaces = source.between_spaces(), target.between_spaces()
    if None not in between_spaces and len(between_spaces[0].words) == len(between_spaces[1].words):
        return between_spaces
    ours, theirs = [w.text for w in ours], [w.text for w in theirs]
    changes = [
        f'"{" ".join(ours[a:b])}" -> "{" ".join(theirs[c:d])}"'
        for kind, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
        if kind != "equal"
    ]
    raise ValueError(
        f"The source prompt has {len(ours)} words and the target prompt {len(theirs)} ({', '.join(changes)}), but a "
        "word swap needs one word for each word; write as many words in both prompts of Attune Prompt Swap, or take "
        "Attune Prompt Refine, which is made for words that are added or taken away."
    )


def _frame(tokens, first, last):
    """Positions of the end tokens and the padding of the chunks from ``first`` up to, without, ``last``."""
    taken = {p for w in tokens.words for p in w.positions}
    return [p for p in range(CHUNK * first + 1, CHUNK * last) if p not in taken]


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
    source, target = same_count(source, target)
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
        frames = [_frame(t, chunk, t.chunks if chunk == chunks - 1 else chunk + 1) for t in (source, target)]
        _share(mapper, *frames)
    return mapper


def align(source, target):
    """For each target column its counterpart in the source, or -1: (T_target,) integers (Prompt-to-Prompt 3.2).

    Words are matched token by token, so that as many as possible of the source's stay, in order (Needleman and Wunsch
    with gaps at 0, matches at 1, mismatches at -1; of equally good ways the one of the authors' code). Start and end
    stand for themselves, chunk by chunk, and padding for the padding at its own place. Where the source has
    something else at that place, since words were taken away, the target's padding has no counterpart; the reference
    code lets it read one of the removed words.
    """
    ours, theirs = source.keys, target.keys
    best = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    for i, (_, a) in enumerate(ours, 1):
        for j, (_, b) in enumerate(theirs, 1):
            best[i][j] = max(best[i][j - 1], best[i - 1][j], best[i - 1][j - 1] + (1 if a == b else -1))
    found = torch.full((target.length,), -1)
    i, j = len(ours), len(theirs)
    while i and j:
        if best[i][j] == best[i][j - 1]:
            j -= 1
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            found[theirs[j][0]] = ours[i][0]
    for chunk in range(min(source.chunks, target.chunks)):
        first = CHUNK * chunk
        (our_end, *our_padding), (their_end, *their_padding) = (_frame(t, chunk, chunk + 1) for t in (source, target))
        found[first], found[their_end] = first, our_end
        for position in set(our_padding) & set(their_padding):
            found[position] = position
    return found


def shifted_words(source, target):
    """The words of the target that a swap lets read another word's map though the source has them, too, before or
    behind their place: (the target's word, the source's word that stands there), in order.

    There are none where as many words stand at their places as could stay in order at all, such as where two words
    change places. ``source`` and ``target`` have equally many words.
    """
    pairs = list(zip(source.words, target.words, strict=True))
    apart = [(ours.keys, theirs.keys) for ours, theirs in pairs if ours.keys != theirs.keys]
    if {ours for ours, _ in apart}.isdisjoint(theirs for _, theirs in apart):
        return []  # no word can have moved; told first, since to align long prompts takes seconds
    found = align(source, target).tolist()
    numbers = {word.positions: number for number, word in enumerate(source.words)}
    stays = [numbers.get(tuple(found[p] for p in word.positions)) for word in target.words]
    at_their_place = sum(ours.keys == theirs.keys for ours, theirs in pairs)
    if sum(number is not None for number in stays) <= at_their_place:
        return []
    return [
        (theirs, ours)
        for place, (ours, theirs) in enumerate(pairs)
        if stays[place] not in (None, place) and ours.keys != theirs.keys
    ]


def refine_map(source, target):
    """The (T_source, T_target) matrix of Prompt-to-Prompt refinement: a column with a counterpart in the source reads
    it, the others are 0, for the target's own.
    """
    found = align(source, target)
    columns = (found >= 0).nonzero()[:, 0]
    mapper = torch.zeros(source.length, target.length)
    mapper[found[columns], columns] = 1
    return mapper
