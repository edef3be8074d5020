"""What a method is: a frozen value that says where it acts and what the attention there reads instead."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Controller:
    """The base of every method; on its own it changes nothing.

    ``prompt`` names the conditioning whose rows are edited: the text that the node encoded and tagged.
    ``tokens`` is that conditioning's length. Subclasses override ``edits`` and one or both of the attentions.
    References are dictionaries from the reference's name ("source") to what it holds at this place.
    ``replaces_words`` says that ``cross_map`` discards what it is given, so that two such on one prompt cannot be.
    """

    replaces_words: ClassVar[bool] = False

    prompt: str
    tokens: int

    def edits(self, place):
        """Whether this method acts at a :class:`Place`. Where it does, the references are read too; in a step where
        no method does, no reference is run.
        """
        return False

    def reads_own_map(self, place):
        """Whether :meth:`cross_map` looks at the target's own map here; where not, it is given None."""
        return True

    def self_attention(self, place, own, references):
        """The :class:`QKV` to attend with at a "self" place, from the target's own and the references'."""
        return own

    def cross_map(self, place, own, references):
        """The probabilities (R, H, N, T) to use at a "cross" place, from the target's own and the references'."""
        return own
