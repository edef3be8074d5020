"""What a method is: a frozen value that says where it acts and what the attention there reads instead."""

from dataclasses import dataclass
from typing import ClassVar

NULL = "source without text"  # the name of a reference that is read under the empty prompt


@dataclass(frozen=True, kw_only=True, eq=False)
class Controller:
    """The base of every method; on its own it changes nothing. Two are never one, however alike they are: a run keeps
    what it gathers by controller, so that equality by value would make a second one of the same prompt vanish.

    ``prompt`` names the conditioning whose rows are edited: the text that the node encoded and tagged.
    ``tokens`` is that conditioning's length. Subclasses override ``edits`` and some of the attentions.
    References are dictionaries from the reference's name ("source") to the :class:`QKV` or map that it has there.

    ``replaces_words`` says that ``cross_map`` discards what it is given, so that two such on one prompt cannot be;
    ``both_halves`` that the negative rows are edited too; ``mixes_texts`` that at "cross" places it has a
    ``cross_output`` and no ``cross_map``; ``mixes`` that it has a ``self_output``, which discards what others
    would put out; ``is_part`` that ``prompt`` names a part of the picture and no text, so that several conditionings,
    positive and negative, can be the part's rows. ``refinement`` is its mask refinement, if any.
    """

    replaces_words: ClassVar[bool] = False
    both_halves: ClassVar[bool] = False
    mixes_texts: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    is_part: ClassVar[bool] = False
    refinement = None

    prompt: str
    tokens: int | None  # None where no words of the text are told apart, so that it may have any length

    @property
    def reads(self):
        """The names of the references that it looks at."""
        return ()

    @property
    def watch(self):
        """The :class:`watch.Watch` that finds its masks, or None."""
        return None

    @property
    def masks(self):
        """The masks (B or 1, H, W) that it holds, as pairs of what the user knows each by and the tensor."""
        return ()

    def edits(self, place):
        """Whether this method acts at a :class:`Place`. Where it does, its references are read too; in a step where
        no method does, no reference is run.
        """
        return False

    def reads_own_map(self, place):
        """Whether :meth:`cross_map` looks at the target's own map here; where not, it is given None."""
        return True

    def self_attention(self, place, own, references):
        """The :class:`QKV` to attend with at a "self" place, from the target's own and the references'."""
        return own

    def self_output(self, place, own, references, attend, seen):
        """What a "self" place puts out (R, N, C), for a method that is no single attention; None for one that is.

        ``attend(q, k, v)`` is the attention; ``seen`` the :class:`watch.Seen` of what its ``watch`` has found.
        """
        return None

    def cross_map(self, place, own, references):
        """The probabilities (R, H, N, T) to use at a "cross" place, from the target's own and the references'."""
        return own

    def cross_output(self, place, out, own, references, attend, seen):
        """What a "cross" place puts out (R, N, C), from what it would put out; ``out`` is None where that is nothing
        but attention to ``own``.
        """
        return out
