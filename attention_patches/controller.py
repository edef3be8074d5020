"""What a method is: a frozen value that says where it acts and what the attention there reads instead."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Controller:
    """The base of every method; on its own it changes nothing.

    ``prompt`` names the conditioning whose rows are edited: the text that the node encoded and tagged.
    ``tokens`` is that conditioning's length. Subclasses override ``active``, ``edits`` and one or both of the others.
    References are dictionaries from the reference's name ("source") to what it holds at this place.
    """

    prompt: str
    tokens: int

    def active(self, step, steps):
        """Whether this method acts anywhere at the 0-based ``step`` of ``steps``; where none does, nothing is run."""
        return False

    def edits(self, place):
        """Whether this method acts at a :class:`Place`. Where it does, the references are read too."""
        return False

    def self_attention(self, place, own, references):
        """The :class:`QKV` to attend with at a "self" place, from the target's own and the references'."""
        return own

    def cross_map(self, place, own, references):
        """The probabilities (R, H, N, T) to use at a "cross" place, from the target's own and the references'."""
        return own
