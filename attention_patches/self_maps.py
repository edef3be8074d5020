"""Self-attention as a value: which parts of a picture belong together, by components and by clusters.

A row of the mean self-attention matrix says where one picture token looks; tokens of one object look alike.
Components are the figures of Prompt-to-Prompt and Free-Prompt-Editing (SVD) and of Dynamic Prompt Learning (PCA);
clusters are what Dynamic Prompt Learning finds the background with (k-means, k = 5, ten starts, on the rows at 32x32).
"""

import torch

from .maps import nearest, pieces_of
from .values import QKV

LIMIT = 4096  # tokens; the matrix of one picture is then 64 MB
PCA, SVD = "PCA", "SVD"
KINDS = (PCA, SVD)
MAPS, FEATURES = "self-attention maps", {"queries": "q", "keys": "k", "values": "v"}


class SelfSum:
    """Adds up the self-attention of one level of a run: feed :meth:`add` every call.

    Until :meth:`choose` is called it only notes which levels there are; from then on it keeps one sum (B, N, N) in
    fp32 on the CPU.
    """

    def __init__(self, pictures):
        self.pictures = pictures
        self.grids = set()
        self.grid = self.total = None
        self.count = 0

    def choose(self, tokens):
        """Settles on the level nearest to ``tokens``. Raises ValueError where every level has too many."""
        small = {g for g in self.grids if g[0] * g[1] <= LIMIT}
        if self.grids and not small:
            least = min(g[0] * g[1] for g in self.grids)
            raise ValueError(
                f"The smallest level of the MODEL has {least} picture tokens here, but Attune Self-Attention View "
                f"holds at most {LIMIT}; give it a smaller picture."
            )
        self.grid = nearest(small, tokens)
        self._begin(self.grid[0] * self.grid[1])

    def _begin(self, size):
        self.total = torch.zeros(self.pictures, size, size)

    def _take(self, place, own, heads):
        for row, at, p in pieces_of(own, heads):
            self.total[row % self.pictures, at] += p.cpu()
        self.count += len(own.q)

    def add(self, place, own, heads):
        if own.k.shape[1] != place.tokens:  # another pack lets the picture read something else besides
            return
        if self.grid is None:
            self.grids.add(place.grid)
        elif place.grid == self.grid:
            self._take(place, own, heads)

    def average(self):
        """The mean (B, N, N) over heads, layers and steps; rows sum to 1."""
        return self.total / (self.count / self.pictures)


class FeatureSum(SelfSum):
    """Adds up the queries, keys or values that one level's self-attention is made of, fed and asked as
    :class:`SelfSum`; ``which`` is "q", "k" or "v".

    A layer's features, its heads side by side, are averaged over the steps, as Dynamic Prompt Learning's figure 3 has
    them. Layers each have axes of their own, so they are put side by side and not averaged; the paper does not say how
    it joins them.
    """

    def __init__(self, pictures, which):
        super().__init__(pictures)
        self.which = which
        self.sums = {}  # layer -> (B, N, C)

    def _begin(self, size):
        self.sums = {}

    def _take(self, place, own, heads):
        features = getattr(own, self.which).float().cpu().unflatten(0, (-1, self.pictures)).sum(0)
        self.sums[place.layer] = self.sums.get(place.layer, 0) + features

    def average(self):
        """Points (B, N, D), D the channels of all layers: each layer's mean has lost its own mean over the picture and
        is scaled to the sum of squares N, so that no layer outweighs another by its scale alone."""
        means = [m - m.mean(1, keepdim=True) for m in self.sums.values()]  # up to their scale, which goes
        lengths = [m.square().sum((1, 2), keepdim=True).clamp(min=1e-12) for m in means]
        return torch.cat([m * (m.shape[1] / n).sqrt() for m, n in zip(means, lengths, strict=True)], 2)


class PlaceSum:
    """Adds up where some picture tokens look: their rows of the self-attention alone, in all levels at once.

    ``weights(grid)`` gives how much each token counts, (B, N) of 0 and up with at least one above 0. What is kept is a
    sum (B, N) a level, so no level is too large.
    """

    def __init__(self, weights):
        self.weights = weights
        self.levels = {}  # grid -> (weights, sum, count)

    def add(self, place, own, heads):
        if own.k.shape[1] != place.tokens:  # another pack lets the picture read something else besides
            return
        if place.grid not in self.levels:
            weights = self.weights(place.grid)
            self.levels[place.grid] = weights, torch.zeros_like(weights), 0
        weights, total, count = self.levels[place.grid]
        for row in range(len(own.q)):
            of = weights[row % len(weights)]
            tokens = of.nonzero()[:, 0]
            share = (of[tokens] / of.sum()).to(own.q.device)
            # Only these rows of the matrix are ever made.
            asked = QKV(own.q[row : row + 1, tokens.to(own.q.device)], own.k[row : row + 1], own.v[row : row + 1])
            for _, at, p in pieces_of(asked, heads):
                total[row % len(weights)] += (share[at] @ p).cpu()
        self.levels[place.grid] = weights, total, count + len(own.q)

    def average(self, tokens):
        """The level's grid (h, w) nearest to ``tokens``, its weights (B, N) and the mean (B, N) over the chosen tokens,
        heads, layers and steps; a row sums to 1. Raises ValueError where no layer lined up."""
        grid = nearest(self.levels, tokens)
        weights, total, count = self.levels[grid]
        return grid, weights, total / (count / len(weights))


def components(matrix, count, kind=PCA):
    """The main components of a picture's mean self-attention (N, N): pictures (count, N), and each one's share.

    With PCA also of points (N, D), such as :class:`FeatureSum` gives.

    PCA takes from every column its mean and gives each token's place along the directions in which the tokens' rows
    differ most; SVD takes from every row its mean and gives these directions themselves, as Prompt-to-Prompt's code
    draws them. Rows of the result are orthonormal, their greatest value is positive, and a share is the part of the
    sum of squares that a component holds. The same matrix gives the same result. Raises ValueError for more components
    than tokens.
    """
    if min(matrix.shape) < count <= len(matrix):
        raise ValueError(
            f"The level has {matrix.shape[1]} channels and so as many components, but Attune Self-Attention View was "
            f"asked for {count}; lower count or choose another level."
        )
    if count > len(matrix):
        raise ValueError(
            f"The level has {len(matrix)} picture tokens and so as many components, but Attune Self-Attention View was "
            f"asked for {count}; lower count or choose a level with more tokens."
        )
    centred = matrix - matrix.mean(0 if kind == PCA else 1, keepdim=True)
    # The library draws its start from the global generator; more columns and rounds than asked for make it exact.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(centred, min(*matrix.shape, count + 16), 12)
    shown = (u if kind == PCA else v).T[:count]
    signs = torch.gather(shown, 1, shown.abs().argmax(1, keepdim=True)).sign()
    return shown * signs, s[:count] ** 2 / (centred**2).sum().clamp(min=1e-30)


def clusters(points, count, seed=0, starts=10, rounds=300):
    """Labels (N,) of points (N, D) in ``count`` clusters by k-means; label 0 is the largest cluster.

    Each of ``starts`` runs begins with k-means++ and goes on until no label changes or ``rounds`` are over; the one
    with the least squared distance wins. The same seed gives the same labels. A cluster stays empty only where
    there are fewer distinct points than clusters.
    """
    generator = torch.Generator().manual_seed(seed)
    points = points.float().cpu()
    points = points - points.mean(0)  # distances are then sums of numbers of their own size
    lengths = points.square().sum(1, keepdim=True)
    results = [_kmeans(points, lengths, _spread(points, lengths, count, generator), rounds) for _ in range(starts)]
    labels, _ = min(results, key=lambda r: r[1])
    sizes = torch.bincount(labels, minlength=count)
    rank = torch.empty(count, dtype=torch.long)
    rank[sizes.argsort(descending=True, stable=True)] = torch.arange(count)
    return rank[labels]


def _distances(points, lengths, centres):
    """Squared distances (N, K); ``lengths`` (N, 1) are the points' own, so that they are not summed up again."""
    return (lengths - points @ (2 * centres).T + centres.square().sum(1)).clamp(min=0)


def _spread(points, lengths, count, generator):
    """First centres (K, D): each new one is the best of a few points drawn by their squared distance (k-means++)."""
    first = torch.randint(len(points), (1,), generator=generator)
    centres, near = points[first], _distances(points, lengths, points[first])[:, 0]
    tries = 2 + count.bit_length()
    for _ in range(1, count):
        weights = near if near.sum() > 0 else torch.ones_like(near)
        drawn = torch.multinomial(weights, tries, replacement=True, generator=generator)
        nearer = torch.minimum(near[:, None], _distances(points, lengths, points[drawn]))
        best = nearer.sum(0).argmin()
        centres, near = torch.cat([centres, points[drawn[best]][None]]), nearer[:, best]
    return centres


def _kmeans(points, lengths, centres, rounds):
    """Labels (N,) and the sum of squared distances after Lloyd's algorithm."""
    labels = None
    for _ in range(rounds):
        distances = _distances(points, lengths, centres)
        near, new = distances.min(1)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        member = torch.nn.functional.one_hot(labels, len(centres)).to(points)
        sizes = member.sum(0)
        centres = (member.T @ points) / sizes.clamp(min=1)[:, None]
        # A cluster that lost all its points starts again at the point that lies worst.
        empty = (sizes == 0).nonzero()[: len(points), 0]
        centres[empty] = points[near.argsort(descending=True)[: len(empty)]]
    return labels, float(near.sum())


def label_masks(labels, count, grid, size):
    """One MASK a cluster (count, H, W), 0 or 1, of labels (h * w) on ``grid``, its pixels as squares at ``size``."""
    masks = torch.nn.functional.one_hot(labels, count).float().T.unflatten(1, grid)
    return torch.nn.functional.interpolate(masks[:, None], size, mode="nearest-exact")[:, 0]
