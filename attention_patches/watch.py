"""Looking on: where words look while a picture is being sampled, for methods that make a mask of it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class WatchedWords:
    """Token positions of words in the source and in the target prompt: those of a thing, and those of what is not."""

    source_inside: tuple = ()
    target_inside: tuple = ()
    source_outside: tuple = ()
    target_outside: tuple = ()

    def read(self, source, target):
        """Their maps, (4, R, N) in the order of the fields, from probabilities ``source`` and ``target`` (R, N, T).

        ``source`` may be None where no word of it is watched.
        """
        pairs = (
            (source, self.source_inside), (target, self.target_inside),
            (source, self.source_outside), (target, self.target_outside),
        )  # fmt: skip
        return torch.stack([p[..., list(at)].sum(-1) if at else torch.zeros_like(target[..., 0]) for p, at in pairs])


@dataclass(frozen=True)
class Watch:
    """What is to be seen: ``words`` in the level nearest to ``level`` picture tokens, of the target and of a
    ``reference``, None for the target alone. ``at_once`` says that the same step needs it.
    """

    words: WatchedWords
    level: int = 256
    reference: str | None = None
    at_once: bool = False


class Seen(NamedTuple):
    """What has been seen, summed over layers: in all steps ``before``, and in this step's layers so far, ``now``.

    Both are (4, B, h, w) in the order of :class:`WatchedWords`' fields, or None while there is nothing.
    """

    before: Tensor | None = None
    now: Tensor | None = None

    @property
    def all(self):
        return _sum(part for part in self if part is not None)


class Lookout:
    """Gathers what watchers see in one sampling. ``grids`` says for each which attention grid (h, w) it looks at.

    A watcher is anything with a ``prompt`` and a ``watch``.
    """

    def __init__(self, grids=()):
        self._grids = dict(grids)
        self._before, self._now = {}, {}  # watcher -> maps; watcher -> layer's number -> maps

    def at(self, place, prompt=None):
        """The watchers that look at this :class:`values.Place`, of all prompts or of one."""
        if place.kind != "cross":
            return []
        return [one for one, grid in self._grids.items() if grid == place.grid and prompt in (None, one.prompt)]

    def next_step(self):
        """Counts what was seen now to what was seen before."""
        self._before = {one: self.seen(one).all for one in (*self._before, *self._now)}
        self._now = {}

    def add(self, watcher, place, source, target, pictures, batch):
        """Adds a layer's maps (R, H, N, T) of the source, or None, and of the target as edited.

        ``pictures`` says which of the ``batch`` pictures each of the R rows draws, None for a row that does not count.
        """
        source = None if source is None else source.mean(1)
        maps = watcher.watch.words.read(source, target.mean(1)).unflatten(2, place.grid)
        layers = self._now.setdefault(watcher, {})
        total = layers.setdefault(place.number, maps.new_zeros(4, batch, *place.grid))
        for row, picture in enumerate(pictures):
            if picture is not None:
                total[:, picture] += maps[:, row]

    def seen(self, watcher, place=None):
        """The :class:`Seen` of a watcher; with a place, ``now`` holds only the layers that run before it."""
        layers = self._now.get(watcher, {})
        now = [maps for number, maps in layers.items() if place is None or number < place.number]
        return Seen(self._before.get(watcher), _sum(now))


def _sum(maps):
    """The sum of tensors, or None of none."""
    total = None
    for one in maps:
        total = one if total is None else total + one
    return total
