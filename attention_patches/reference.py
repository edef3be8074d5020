"""What rides on MODEL: known runs under a name, and the controllers that read them. Frozen values, torch only."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Reference:
    """A known run that an edit reads, under a name.

    ``sigmas`` (S+1,) from noise to picture, ``latents`` (S+1, B, C, h, w) in the model's own scale, ``conditioning``
    the stock list under which its features are read. ``steps`` is how many steps windows count, as in a Trajectory.
    ``tell(text)`` hears of a sampling that does not start on it, or at ``begin`` (B, C, h, w) where the method starts
    elsewhere; None for one that may start anywhere.
    """

    name: str
    sigmas: torch.Tensor
    latents: torch.Tensor
    conditioning: list
    steps: int
    tell: Callable[[str], None] | None = None
    begin: torch.Tensor | None = None

    def step(self, sigma):
        """The 0-based step that a sampler at ``sigma`` is in: the last grid point at or above it."""
        return max(0, int((self.sigmas[:-1] >= sigma * (1 - 1e-4)).sum()) - 1)

    def latent(self, sigma):
        """The latent at ``sigma``; linear in sigma between grid points, which is the path that Euler's method took."""
        i = self.step(sigma)
        high, low = float(self.sigmas[i]), float(self.sigmas[i + 1])
        share = min(1.0, max(0.0, (high - sigma) / (high - low)))
        # On a grid point it must be the stored latent to the last bit.
        return self.latents[i] if share < 1e-4 else torch.lerp(self.latents[i], self.latents[i + 1], share)


@dataclass(frozen=True, eq=False)
class Spec:
    """All references, controllers and local blends on a MODEL. `clone()` deep-copies what it finds; this is immutable
    and stays.
    """

    references: tuple = ()
    controllers: tuple = ()
    blends: tuple = ()

    def __deepcopy__(self, memo):
        return self

    @property
    def lengths(self):
        """The prompts whose rows are edited or looked at, and the length of their conditionings, None where nobody
        reads words of them."""
        found = {}
        for one in (*self.controllers, *self.watchers):
            found[one.prompt] = found.get(one.prompt) or one.tokens
        return found

    @property
    def parts(self):
        """The names of the parts of the picture that are edited, each in its own positive and negative rows."""
        return tuple(dict.fromkeys(c.prompt for c in self.controllers if c.is_part))

    @property
    def watchers(self):
        """The controllers and blends that have to see where words look."""
        return tuple(one for one in (*self.controllers, *self.blends) if one.watch is not None)
