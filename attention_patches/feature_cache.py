"""Source features kept in memory, so that a second edit of the same picture runs no UNet row for the source.

The one thing here that outlives a run: it belongs to the output of the node that made it, and goes when the host drops
that. It never holds more than its limit, and what it gives back is what was put in, bit for bit.
"""

from .values import QKV


class FeatureCache:
    """At most ``limit`` bytes of q, k, v by source, moment and layer; ``tell(text)`` is called after each sampling.

    A source is any hashable key that says all that its features follow from, but for the noise level, the moment.
    ``size`` is how many bytes are held.
    """

    def __init__(self, limit, tell=lambda text: None):
        self.limit, self.tell, self.size = limit, tell, 0
        self._kept = {}  # source -> moment -> layer -> QKV on the CPU; the source used last is the last

    def __deepcopy__(self, memo):
        return self  # `clone()` deep-copies what rides on MODEL; every clone's edits shall find the same

    def find(self, source, moment, layers):
        """What is kept of all these ``layers``: layer -> QKV, or None where one of them is not."""
        if source in self._kept:
            self._kept[source] = self._kept.pop(source)
        held = self._kept.get(source, {}).get(moment, {})
        return {layer: held[layer] for layer in layers} if all(layer in held for layer in layers) else None

    def keep(self, source, moment, features, beside=()):
        """Keeps ``features`` (layer -> QKV) where there is room, for which it drops the sources that were not used for
        longest, but neither this one nor those ``beside`` it. Returns whether there was room."""
        held = self._kept.get(source, {}).get(moment, {})
        new = {layer: one for layer, one in features.items() if layer not in held}
        size = sum(t.nbytes for one in new.values() for t in one)
        old = [other for other in self._kept if other != source and other not in beside]
        while old and self.size + size > self.limit:
            self._drop(old.pop(0))
        if self.size + size > self.limit:
            return False
        moments = self._kept.setdefault(source, {})
        moments.setdefault(moment, {}).update((layer, QKV(*map(_in_ram, one))) for layer, one in new.items())
        self.size += size
        return True

    def _drop(self, source):
        for held in self._kept.pop(source).values():
            self.size -= sum(t.nbytes for one in held.values() for t in one)


def _in_ram(tensor):
    """The tensor on the CPU, and no view of a larger one, which would stay alive with it."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach().cpu() if whole or tensor.device.type != "cpu" else tensor.detach().clone()
