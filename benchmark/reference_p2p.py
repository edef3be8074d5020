"""Prompt-to-Prompt as its paper and its authors' code run it, on diffusers (Hertz et al. 2022, arXiv 2208.01626).

Source and target are drawn in lockstep, one batch [null, null, source, target] a step, with every attention map
written out as probabilities. Written apart from Attune's own edits, which it is there to check: it has its own reading
of words, its own alignment and its own windows, and shares with the pack token ids, text embeddings and weights only.

Shapes: T columns (77 a chunk, as many in both prompts), H heads, N picture tokens, S steps. All on the CPU, fp32.

Where the authors' code is wrong, ``quirk`` does as it does, and what is right is the default.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from . import reference

CHUNK = 77
SOURCE, TARGET = 2, 3  # rows of the batch


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the text encoder reads it: ``ids`` (T) with start, end and padding; ``pieces`` (T), what each token
    spells, "" for those three; ``embedding`` (1, T, width)."""

    text: str
    ids: tuple
    pieces: tuple
    embedding: torch.Tensor

    @property
    def words(self):
        """The columns of each word of ``text``, words being what single spaces part, found by counting letters."""
        words, found = self.text.split(" "), []
        number, letters = 0, 0
        for column, piece in enumerate(self.pieces):
            if not piece:
                continue
            if not letters:
                found.append([])
            found[-1].append(column)
            letters += len(piece)
            if letters >= len(words[number]):
                number, letters = number + 1, 0
        return found

    def columns(self, word):
        """The columns of every occurrence of ``word``. Raises ValueError for one that the prompt does not hold."""
        pairs = zip(self.text.split(" "), self.words, strict=True)
        found = [column for text, columns in pairs if text == word for column in columns]
        if not found:
            raise ValueError(f'The word "{word}" is not in the prompt "{self.text}".')
        return found

    def indicator(self, words):
        """(T,): 1 on the columns of those of ``words`` that the prompt holds."""
        marked = torch.zeros(len(self.ids))
        for word in words:
            if word in self.text.split(" "):
                marked[self.columns(word)] = 1
        return marked


@dataclass(frozen=True, eq=False)
class Edit:
    """What the target's attention becomes. In cross-attention, with the source's map M and the target's own O,

        alpha * (M @ mapper + O * keep) * scale + (1 - alpha) * O,   column by column of the target.

    ``mapper`` (T, T), ``keep`` and ``scale`` (T,), ``alpha`` (S + 1, T). The authors' code bounds the scale by the same
    alpha; where it has windows of its own, ``scale_alpha`` (S + 1, T), it is applied behind the rest. In the steps
    ``self_steps`` (first, one past the last) the source's self-attention stands in for the target's where N <=
    ``self_limit``. ``cross_layers`` and ``self_layers`` are the numbers, from 0, of the layers that are edited, None
    for all.
    """

    mapper: torch.Tensor
    keep: torch.Tensor
    scale: torch.Tensor
    alpha: torch.Tensor
    self_steps: tuple = (0, 0)
    self_limit: int = 0
    scale_alpha: torch.Tensor | None = None
    cross_layers: frozenset | None = None
    self_layers: frozenset | None = None


@dataclass(frozen=True, eq=False)
class Blend:
    """Local blend, as null-text inversion's code has it. ``inside`` and ``outside`` (2, T) mark the words' columns in
    the source and in the target; a prompt without any has no mask of its own. The level with N nearest to ``tokens``
    is read. Blending starts after ``start`` (0..1) of the steps. ``outside_threshold`` is the second of the authors'
    pair of thresholds, None for the first again."""

    inside: torch.Tensor
    outside: torch.Tensor
    threshold: float = 0.3
    start: float = 0.2
    tokens: int = 256
    outside_threshold: float | None = None


# ---- the three edits ---------------------------------------------------------------------------------------------


def swap(source, target, quirk=False):
    """(mapper, keep) of a word swap: words stand for words in order.

    A word of another number of tokens shares its attention among the target word's. All that follows such a word is
    counted on from where it ends in each prompt; the authors' code (``quirk``) counts on in the target only after the
    last word that was swapped, and reads the source there. It knows one chunk of 77 tokens.

    Raises ValueError for prompts with different numbers of words or chunks.
    """
    before, after = source.text.split(" "), target.text.split(" ")
    if len(before) != len(after) or len(source.ids) != len(target.ids):
        raise ValueError(f'"{source.text}" and "{target.text}" differ in their number of words or chunks.')
    size = len(target.ids)
    mapper = torch.zeros(size, size)
    pairs = list(zip(source.words, target.words, strict=True))
    if quirk:
        changed = [pair for pair, a, b in zip(pairs, before, after, strict=True) if a != b]
        at = to = 0  # columns done in the source, in the target
        for ours, theirs in changed:
            while at < ours[0]:
                mapper[at, to] = 1
                at, to = at + 1, to + 1
            _exchange(mapper, ours, theirs)
            at, to = at + len(ours), to + len(theirs)
        for column in range(to, to + min(size - at, size - to)):
            mapper[column, column] = 1
        return mapper, torch.zeros(size)
    for ours, theirs in pairs:
        _exchange(mapper, ours, theirs)
    for first in range(0, size, CHUNK):
        rest = [[c for c in range(first, first + CHUNK) if not p.pieces[c]] for p in (source, target)]
        _hand_out(mapper, *rest)
    return mapper, torch.zeros(size)


def _exchange(mapper, ours, theirs):
    if len(ours) == len(theirs):
        mapper[ours, theirs] = 1
    else:
        mapper[torch.tensor(ours)[:, None], torch.tensor(theirs)] = 1 / len(theirs)


def _hand_out(mapper, ours, theirs):
    """Start, end and padding, one to one. With fewer of ``theirs`` the last reads all that is left; with fewer of
    ``ours`` the last is shared among what is left. So no source column is lost or read twice."""
    both = min(len(ours), len(theirs))
    mapper[ours[:both], theirs[:both]] = 1
    mapper[ours[both:], theirs[-1]] = 1
    if len(theirs) > both:
        mapper[ours[-1], theirs[both - 1 :]] = 1 / (1 + len(theirs) - both)


def refine(source, target, quirk=False):
    """(mapper, keep) of a refinement: tokens that both prompts share read the source, new ones keep their own map.

    Padding reads the source's column of the same number. When words were taken away, the source still has words or its
    end there, whose attention is no padding's: the authors' code (``quirk``) reads them, here such a column keeps its
    own. Raises ValueError for more than 77 tokens, where the authors' code cuts the prompt off.
    """
    if len(source.ids) != CHUNK or len(target.ids) != CHUNK:
        raise ValueError("A refinement is written for one chunk of 77 tokens.")
    ours, theirs = (p.ids[: p.ids.index(p.ids[-1]) + 1] for p in (source, target))  # padding repeats the end token
    aligned = align(ours, theirs)
    mapper, keep = torch.zeros(CHUNK, CHUNK), torch.zeros(CHUNK)
    for column in range(CHUNK):
        at = aligned[column] if column < len(theirs) else column
        if at is None or (column >= len(theirs) and column < len(ours) and not quirk):
            keep[column] = 1
        else:
            mapper[at, column] = 1
    return mapper, keep


def align(ours, theirs):
    """For each of ``theirs`` the place in ``ours`` that it stands for, or None (Needleman and Wunsch 1970).

    A match counts 1, a mismatch -1, a gap 0; of equal ways the one that inserts in ``theirs`` is taken, then the one
    that drops from ``ours``. At these prices two gaps always beat a mismatch, so only equal tokens pair.
    """
    score = [[0] * (len(theirs) + 1) for _ in range(len(ours) + 1)]
    came = {}
    for i, a in enumerate(ours, 1):
        for j, b in enumerate(theirs, 1):
            ways = (
                (score[i][j - 1], "insert"),
                (score[i - 1][j], "drop"),
                (score[i - 1][j - 1] + (1 if a == b else -1), "pair"),
            )
            score[i][j] = max(value for value, _ in ways)
            came[i, j] = next(way for value, way in ways if value == score[i][j])
    found = [None] * len(theirs)
    i, j = len(ours), len(theirs)
    while i and j:
        way = came[i, j]
        if way == "pair":
            found[j - 1] = i - 1
        i, j = i - (way != "insert"), j - (way != "drop")
    return found


def same(prompt):
    """(mapper, keep) that reads the source column for column: what re-weighting alone stands on."""
    size = len(prompt.ids)
    return torch.eye(size), torch.zeros(size)


def windows(target, steps, cross, words=None):
    """alpha (S + 1, T): 1 from row floor(a (S + 1)) to before floor(b (S + 1)), ``cross`` being (a, b); ``words`` maps
    words of the target to windows of their own."""
    table = torch.zeros(steps + 1, len(target.ids))
    spans = [(slice(None), cross)] + [(target.columns(word), span) for word, span in (words or {}).items()]
    for columns, (start, end) in spans:
        table[:, columns] = 0
        for row in range(int(start * (steps + 1)), int(end * (steps + 1))):
            table[row, columns] = 1
    return table


def factors(target, weights=None):
    """scale (T,): each word's factor on all of its columns, 1 elsewhere. Maps are not normalised afterwards."""
    scale = torch.ones(len(target.ids))
    for word, factor in (weights or {}).items():
        scale[target.columns(word)] = factor
    return scale


# ---- drawing in lockstep -----------------------------------------------------------------------------------------


class _Lockstep:
    """What the attention layers share while one pair is drawn."""

    def __init__(self, edit):
        self.edit, self.step, self.asked = edit, 0, {"self": 0, "cross": 0}
        self.sums = {}  # N -> (2, N, T), cross maps of source and target over heads, layers and steps, as edited

    def begin(self, step):
        self.step, self.asked = step, {"self": 0, "cross": 0}

    def number(self, kind):
        """Which layer of its kind this is, in the order in which the network runs them."""
        self.asked[kind] += 1
        return self.asked[kind] - 1

    def self_map(self, p):
        number, layers = self.number("self"), self.edit.self_layers
        if layers is not None and number not in layers:
            return
        first, last = self.edit.self_steps
        if first <= self.step < last and p.shape[2] <= self.edit.self_limit:
            p[TARGET] = p[SOURCE]

    def cross_map(self, p):
        edit, own, number = self.edit, p[TARGET], self.number("cross")
        alpha = edit.alpha[self.step]
        if edit.cross_layers is not None and number not in edit.cross_layers:
            alpha = torch.zeros_like(alpha)
        edited = p[SOURCE] @ edit.mapper + own * edit.keep
        if edit.scale_alpha is None:
            p[TARGET] = alpha * edited * edit.scale + (1 - alpha) * own
        else:
            acts = edit.scale_alpha[self.step]
            p[TARGET] = (alpha * edited + (1 - alpha) * own) * (acts * edit.scale + 1 - acts)
        tokens = p.shape[2]
        self.sums[tokens] = self.sums.get(tokens, 0) + p[SOURCE:].sum(1)


class _Attention:
    """A diffusers attention processor that computes its map, lets the pair's rows be edited, and applies it."""

    def __init__(self, run):
        self.run = run

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        cross = encoder_hidden_states is not None
        text = encoder_hidden_states if cross else hidden_states
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(text))
        v = attn.head_to_batch_dim(attn.to_v(text))
        p = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        by_row = p.unflatten(0, (len(hidden_states), -1))  # (4, H, N, T or N), a view
        (self.run.cross_map if cross else self.run.self_map)(by_row)
        return attn.to_out[0](attn.batch_to_head_dim(p @ v))


@torch.no_grad()
def draw(unet, scheduler_kind, noise, source, target, null, guidance, steps, edit, blend=None):
    """Draws source and target from one noise (1, 4, h, w) in diffusers' coordinates, both under ``guidance``.

    ``source`` and ``target`` are :class:`Prompt`, ``null`` (1, T, width) the embedding of "", ``scheduler_kind`` and
    ``steps`` as in :func:`reference.scheduler`. The source row runs freely, as in the paper: it is whatever these
    settings draw from ``noise``.

    Returns (S + 1 tensors (2, 4, h, w), source and target, from noise to picture; the last mask (1, 1, h, w) or None).
    """
    ddim = reference.scheduler(scheduler_kind, steps)
    text = torch.cat([null, null, source.embedding, target.embedding])
    run, mask = _Lockstep(edit), None
    before = unet.attn_processors
    unet.set_attn_processor({name: _Attention(run) for name in before})
    try:
        latents = [noise.repeat(2, 1, 1, 1)]
        for step, t in enumerate(ddim.timesteps.tolist()):
            run.begin(step)
            z = latents[-1]
            empty, clean = unet(torch.cat([z, z]), t, encoder_hidden_states=text).sample.chunk(2)
            z = ddim.step(empty + guidance * (clean - empty), t, z).prev_sample
            if blend is not None and run.step + 1 > int(blend.start * steps):
                mask = _mask(blend, run.sums, z.shape[2:])
                z = z[:1] + mask * (z - z[:1])
            latents.append(z)
    finally:
        unet.set_attn_processor(before)
    return latents, mask


def _mask(blend, sums, size):
    tokens = min(sums, key=lambda n: abs(torch.tensor(n / blend.tokens).log()))
    maps = sums[tokens]
    mask = _above(maps, blend.inside, blend.threshold, size, pool=True)
    if blend.outside.any():
        second = blend.threshold if blend.outside_threshold is None else blend.outside_threshold
        mask = mask & ~_above(maps, blend.outside, second, size, pool=False)
    return mask.float()


def _above(maps, marked, threshold, size, pool):
    """(1, 1, h, w), where source or target looks at the marked words."""
    height = round((maps.shape[1] * size[0] / size[1]) ** 0.5)
    found = torch.zeros(1, 1, *size, dtype=torch.bool)
    for look, columns in zip(maps, marked, strict=True):
        if not columns.any():  # 0 / 0 in the authors' code, which is above nothing
            continue
        heat = (look * columns).sum(-1).view(1, 1, height, -1)
        if pool:
            heat = F.max_pool2d(heat, 3, stride=1, padding=1)
        heat = F.interpolate(heat, size=tuple(size))
        found |= heat / heat.max() > threshold
    return found
