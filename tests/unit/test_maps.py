import math

import pytest
import torch

from attune.attention_patches import maps, self_maps
from attune.attention_patches.values import QKV, Place, attention_map

HEADS, TOKENS = 2, 7
LAYERS = [(("input", 1), (4, 6)), (("input", 4), (2, 3)), (("output", 8), (2, 3)), (("output", 11), (4, 6))]


def calls(kind="cross", rows=2, seed=0, step=0):
    """One run of a small UNet: a place and random q, k, v for each layer."""
    generator = torch.Generator().manual_seed(seed)
    for block, grid in LAYERS:
        size = grid[0] * grid[1]
        lengths = (size, TOKENS, TOKENS) if kind == "cross" else (size,) * 3
        qkv = QKV(*(2 * torch.randn(rows, n, 8, generator=generator) for n in lengths))
        yield Place(kind, block, 0, grid, step, 1), qkv


def gather(positions, steps=1, rows=2):
    gathered = maps.MapSum(positions)
    for step in range(steps):
        gathered.step = 5 * step
        for place, own in calls(seed=step, rows=rows):
            gathered.add(place, own, HEADS)
    return gathered


def one_sentence(error, *parts):
    text = str(error.value)
    assert all(part in text for part in parts), text
    assert "\n" not in text and text.endswith(".") and ". " not in text


# ---- cross-attention ---------------------------------------------------------------------------------------------


def test_a_map_is_the_mean_probability_of_its_words_tokens():
    found = gather([(2, 3), (5,)]).collect(["big cat", "mat"], 0, 24, False, 1)
    own = next(calls())[1]
    p = attention_map(own.q, own.k, HEADS).mean(1).unflatten(1, (4, 6))
    assert found.words == ("big cat", "mat") and found.layers == ("0 down 6x4",) and found.steps == ((0,),)
    assert found.maps[0].shape == (2, 1, 2, 4, 6)
    assert torch.allclose(found.maps[0][0, 0], p[..., 2] + p[..., 3], atol=1e-6)
    assert torch.allclose(found.maps[0][1, 0], p[..., 5], atol=1e-6)


def test_a_word_of_several_pieces_is_the_sum_of_them():
    pieces = gather([(1,), (2,), (3,)]).level(24)
    assert torch.allclose(gather([(1, 2, 3)]).level(24)[0], pieces.sum(0), atol=1e-6)


def test_all_words_together_are_everything():
    assert torch.allclose(gather([tuple(range(TOKENS))]).level(6), torch.ones(1, 2, 2, 3), atol=1e-5)


@pytest.mark.parametrize("piece", [1, 50, 123])
def test_small_pieces_change_nothing(piece, monkeypatch):
    whole = gather([(1,), (4,)]).level(24)
    monkeypatch.setattr(maps, "PIECE", piece)
    assert torch.allclose(gather([(1,), (4,)]).level(24), whole, atol=1e-6)


def test_the_level_is_the_mean_of_its_layers():
    gathered = gather([(1,), (4,)], steps=3)
    each = gathered.collect("ab", maps.EACH, 24, False, 15)
    assert each.layers == ("0 down 6x4", "1 down 3x2", "2 up 3x2", "3 up 6x4")
    level = gathered.collect("ab", maps.NEAREST, 24, False, 15)
    assert level.layers == ("6x4, 2 layers",)
    assert torch.allclose(level.maps[0], (each.maps[0] + each.maps[3]) / 2, atol=1e-6)
    assert torch.allclose(gathered.collect("ab", "up", 5, False, 15).maps[0], each.maps[2], atol=1e-6)
    assert gathered.collect("ab", "down", 5, False, 15).layers == ("down 3x2, 1 layer",)


def test_the_average_is_the_mean_of_the_steps():
    gathered = gather([(1,), (4,)], steps=3)
    each = gathered.collect("ab", maps.EACH, 24, True, 15)
    assert each.steps == ((0,), (5,), (10,)) and each.maps[1].shape == (2, 3, 2, 2, 3)
    average = gathered.collect("ab", maps.EACH, 24, False, 15)
    assert average.steps == ((0, 5, 10),)
    for apart, together in zip(each.maps, average.maps, strict=True):
        assert not torch.allclose(apart[:, 0], apart[:, 1], atol=1e-3)
        assert torch.allclose(apart.mean(1, keepdim=True), together, atol=1e-6)


def test_a_layer_of_two_sizes_is_shown_where_it_has_the_one_of_more_steps():
    gathered = maps.MapSum([(1,)])
    for step in range(3):
        gathered.step = step
        for i, (place, own) in enumerate(calls(seed=step)):
            if step == i == 0:
                place, own = Place(place.kind, place.block, 0, (2, 3), 0, 1), QKV(own.q[:, :6], own.k, own.v)
            gathered.add(place, own, HEADS)
    found = gathered.collect("a", maps.EACH, 24, True, 3)
    assert found.layers[0] == "0 down 6x4" and len(found.layers) == 4
    assert found.steps == ((1,), (2,)) and {m.shape[1] for m in found.maps} == {2}


@pytest.mark.parametrize(("choice", "part"), [(4, "0 to 3"), ("middle", '"middle"')])
def test_layers_that_are_not_there(choice, part):
    with pytest.raises(ValueError) as error:
        gather([(1,)]).collect("a", choice, 24, False, 1)
    one_sentence(error, part, "Attune Attention Maps")


def test_nothing_lined_up():
    with pytest.raises(ValueError) as error:
        maps.MapSum([(1,)]).collect("a", maps.NEAREST, 24, False, 1)
    one_sentence(error, "connect the MODEL from before that pack's node")


def test_the_nearest_level():
    grids = {(64, 64), (32, 32), (16, 16), (8, 8)}
    assert [maps.nearest(grids, n) for n in (1, 250, 1000, 1e9)] == [(8, 8), (16, 16), (32, 32), (64, 64)]
    assert maps.nearest(grids, 512) == (32, 32)  # as near as 16x16


def test_noised_is_what_the_network_is_shown():
    clean, noise, sigmas = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), torch.tensor([10.0, 1.0, 0.0])
    path = maps.noised(clean, noise, sigmas)
    assert path.shape == (3, 2, 4, 3, 5) and torch.equal(path[2], clean)
    assert torch.allclose(path[0], clean + 10 * noise, atol=1e-5)


# ---- masks -------------------------------------------------------------------------------------------------------


def found_of(*layers):
    """Maps of one word, one step and one picture."""
    return maps.WordMaps(("x",), tuple("ab")[: len(layers)], ((0,),), 1, tuple(m[None, None, None] for m in layers))


def test_a_soft_mask_is_the_stretched_mean_of_its_layers():
    one, two = torch.rand(4, 6) * 0.2, torch.rand(4, 6) * 0.3
    mask = maps.mask_of(found_of(one, two), 0, (4, 6), 0, 0, 0)
    assert torch.allclose(mask[0], maps.stretch((one + two)[None])[0], atol=1e-6)
    assert mask.min() == 0 and mask.max() == 1


def test_a_threshold_cuts_at_the_share_of_the_range():
    ramp = torch.linspace(0.02, 0.12, 11).expand(1, 11)
    hard = maps.mask_of(found_of(ramp), 0, (1, 11), 0.55, 0, 0)
    assert hard.tolist() == [[[0.0] * 6 + [1.0] * 5]]


def test_a_flat_map_is_an_empty_mask():
    flat = 0.7 + 1e-7 * torch.rand(4, 4)
    for threshold in (0, 0.3):
        mask = maps.mask_of(found_of(flat), 0, (32, 32), threshold, 3, 3)
        assert torch.equal(mask, torch.zeros(1, 32, 32))


def test_getting_smaller_averages():
    big = torch.rand(1, 16, 16)
    plain = torch.nn.functional.interpolate(big[None], (4, 4), mode="bilinear")[0]
    small = maps.resize(big, (4, 4))
    assert abs(float(small.mean() - big.mean())) < 0.01 and small.std() < 0.7 * plain.std()


@pytest.mark.parametrize("pixels", [1, 4, 9])
def test_growing_reaches_as_far_in_every_direction(pixels):
    dot = torch.zeros(1, 41, 41)
    dot[0, 20, 20] = 1
    grown = maps.grown(dot, pixels)[0]
    assert grown[20].sum() == grown[:, 20].sum() == 2 * pixels + 1
    y, x = torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij")
    away = ((y - 20) ** 2 + (x - 20) ** 2).sqrt()
    assert away[grown > 0].max() <= 1.13 * pixels and (grown[away <= 0.8 * pixels] == 1).all()
    # Shrinking is growing of what is outside.
    assert torch.equal(maps.grown(1 - dot, -pixels)[0], 1 - grown)


def test_feathering_blurs_the_edge_and_keeps_the_middle():
    step = torch.zeros(1, 20, 60)
    step[..., 30:] = 1
    soft = maps.feathered(step, 8)
    assert torch.equal(maps.feathered(step, 0), step)
    assert soft.isfinite().all() and soft.min() >= 0 and soft.max() <= 1
    assert abs(float(soft[0, 0, 29] + soft[0, 0, 30]) - 1) < 1e-5  # half at the edge itself
    # A Gaussian of sigma 4: 8 pixels away 97.7 % of the step is over.
    for at, share in ((21.5, 0.0228), (25.5, 0.1587), (33.5, 0.8413)):
        wanted = 0.5 * (1 + math.erf((at - 29.5) / 4 / math.sqrt(2)))
        assert abs(wanted - share) < 0.001
        seen = (soft[0, 0, math.floor(at)] + soft[0, 0, math.ceil(at)]) / 2
        assert abs(float(seen) - wanted) < 0.01
    assert torch.allclose(soft[0, 0], soft[0, 19], atol=1e-6)  # the border adds nothing


# ---- self-attention ----------------------------------------------------------------------------------------------


def self_sum(tokens=24, rows=2, pictures=2):
    gathered = self_maps.SelfSum(pictures)
    for look in range(3):
        for place, own in calls("self", rows, seed=look):
            gathered.add(place, own, HEADS)
        if look == 0:
            gathered.choose(tokens)
    return gathered


def by_hand(grid, rows=2):
    kept = [
        attention_map(own.q, own.k, HEADS).mean(1)
        for look in (1, 2)
        for place, own in calls("self", rows, seed=look)
        if place.grid == grid
    ]
    return torch.stack(kept).mean(0)


@pytest.mark.parametrize(("tokens", "grid"), [(24, (4, 6)), (5, (2, 3))])
def test_the_mean_self_attention(tokens, grid, monkeypatch):
    monkeypatch.setattr(maps, "PIECE", 100)
    gathered = self_sum(tokens)
    assert gathered.grid == grid
    assert torch.allclose(gathered.average(), by_hand(grid), atol=1e-6)


def test_two_texts_of_one_picture_are_averaged():
    both = self_sum(rows=4, pictures=2).average()
    four = by_hand((4, 6), rows=4)
    assert torch.allclose(both, (four[:2] + four[2:]) / 2, atol=1e-6)


def test_only_levels_that_fit_are_kept(monkeypatch):
    monkeypatch.setattr(self_maps, "LIMIT", 10)
    assert self_sum(24).grid == (2, 3)
    monkeypatch.setattr(self_maps, "LIMIT", 5)
    with pytest.raises(ValueError) as error:
        self_sum(24)
    one_sentence(error, "6 picture tokens", "at most 5", "smaller picture")


def test_no_self_attention_lined_up():
    with pytest.raises(ValueError) as error:
        self_maps.SelfSum(1).choose(24)
    one_sentence(error, "lines up", "connect the MODEL")


def fed(gathered, rows=2, looks=(1, 2)):
    for look in looks:
        for place, own in calls("self", rows, seed=look):
            gathered.add(place, own, HEADS)
    return gathered


@pytest.mark.parametrize(("tokens", "grid"), [(24, (4, 6)), (5, (2, 3))])
@pytest.mark.parametrize("rows", [2, 4])
def test_a_place_looks_where_its_rows_of_the_matrix_do(tokens, grid, rows, monkeypatch):
    monkeypatch.setattr(maps, "PIECE", 30)
    generator = torch.Generator().manual_seed(7)
    weights = {g: torch.rand(2, g[0] * g[1], generator=generator).sub(0.4).clamp(min=0) for _, g in LAYERS}
    found, of, mean = fed(self_maps.PlaceSum(weights.get), rows).average(tokens)
    assert found == grid and torch.equal(of, weights[grid])
    whole = by_hand(grid, rows).unflatten(0, (-1, 2)).mean(0)
    wanted = torch.einsum("bn,bnm->bm", of / of.sum(1, keepdim=True), whole)
    assert torch.allclose(mean, wanted, atol=1e-6) and torch.allclose(mean.sum(1), torch.ones(2), atol=1e-5)


def test_only_the_rows_of_the_place_are_made(monkeypatch):
    made = []
    monkeypatch.setattr(maps, "attention_map", lambda q, k, h: made.append(q.shape[1]) or attention_map(q, k, h))
    one = {g: torch.eye(g[0] * g[1])[:1] for _, g in LAYERS}
    fed(self_maps.PlaceSum(one.get), rows=1)
    assert set(made) == {1}


@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_features_are_means_of_steps_and_layers_side_by_side(which):
    gathered = self_maps.FeatureSum(2, which)
    fed(gathered, rows=4, looks=(0,))
    gathered.choose(24)
    points = fed(gathered, rows=4).average()
    layers = [n for n, (_, grid) in enumerate(LAYERS) if grid == (4, 6)]
    drawn = [[getattr(own, which) for _, own in calls("self", 4, seed=look)] for look in (1, 2)]
    wanted = []
    for number in layers:
        mean = sum(look[number][:2] + look[number][2:] for look in drawn) / 4
        mean = mean - mean.mean(1, keepdim=True)
        wanted.append(mean / mean.square().sum((1, 2), keepdim=True).sqrt() * 24**0.5)
    assert points.shape == (2, 24, 16) and torch.allclose(points, torch.cat(wanted, 2), atol=1e-5)
    shown, shares = self_maps.components(points[0], 3)
    u, s, _ = torch.linalg.svd(points[0].double())
    assert ((shown.double() * u.T[:3]).sum(1).abs() > 0.999).all()
    assert torch.allclose(shares.double(), s[:3] ** 2 / (s**2).sum(), rtol=1e-3)
    with pytest.raises(ValueError) as error:
        self_maps.components(points[0], 17)
    one_sentence(error, "16 channels", "lower count")


def self_map(size=144, seed=0):
    """A self-attention matrix with some structure and much noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return (x @ x.T + 0.5 * torch.randn(size, size, generator=generator)).softmax(-1)


@pytest.mark.parametrize("kind", self_maps.KINDS)
def test_components_are_those_of_the_full_decomposition(kind):
    matrix = self_map()
    shown, shares = self_maps.components(matrix, 6, kind)
    centred = matrix - matrix.mean(0 if kind == self_maps.PCA else 1, keepdim=True)
    u, s, vh = torch.linalg.svd(centred.double())
    truth = u.T if kind == self_maps.PCA else vh
    assert torch.allclose(shown @ shown.T, torch.eye(6), atol=1e-4)
    assert ((shown.double() * truth[:6]).sum(1).abs() > 0.999).all()
    assert torch.allclose(shares.double(), s[:6] ** 2 / (s**2).sum(), rtol=1e-3)
    assert (shown.amax(1) >= -shown.amin(1)).all()


def test_components_repeat_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = self_maps.components(self_map(), 3)[0]
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(6)
    assert torch.equal(self_maps.components(self_map(), 3)[0], first)


def test_components_of_a_level_that_is_too_small_or_flat():
    assert self_maps.components(self_map(4), 4)[0].shape == (4, 4)
    with pytest.raises(ValueError) as error:
        self_maps.components(self_map(4), 5)
    one_sentence(error, "4 picture tokens", "lower count")
    shown, shares = self_maps.components(torch.full((16, 16), 1 / 16), 3)
    assert shown.isfinite().all() and shares.abs().max() < 1e-3


def blobs(sizes=(50, 20, 30, 10), seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(len(sizes), 40, generator=generator)
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.randperm(len(truth), generator=generator)
    truth = truth[order]
    return centres[truth] + torch.randn(len(truth), 40, generator=generator), truth


@pytest.mark.parametrize("seed", range(5))
def test_clusters_find_what_is_apart_and_are_ordered_by_size(seed):
    points, truth = blobs(seed=seed)
    labels = self_maps.clusters(points, 4, seed)
    rank = torch.tensor([0, 2, 1, 3])  # of blobs of 50, 20, 30 and 10
    assert torch.equal(labels, rank[truth])


def spread_of(points, labels):
    return sum(float((p - p.mean(0)).square().sum()) for p in (points[labels == i] for i in labels.unique()))


def test_clusters_repeat_and_more_starts_are_no_worse():
    points = self_map(300)
    first = self_maps.clusters(points, 5, 1)
    state = torch.get_rng_state()
    assert torch.equal(self_maps.clusters(points, 5, 1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.bincount().tolist() == sorted(first.bincount().tolist(), reverse=True)
    singles = [spread_of(points, self_maps.clusters(points, 5, seed, starts=1)) for seed in range(8)]
    best = spread_of(points, first)
    assert best <= sorted(singles)[2] and max(singles) > 1.0005 * best  # ten starts matter, and help


def test_clusters_match_another_implementation():
    vq = pytest.importorskip("scipy.cluster.vq")
    points = self_map(300)
    theirs = [vq.kmeans2(points.double().numpy(), 5, minit="++", iter=200, seed=s) for s in range(20)]
    best = min(spread_of(points, torch.from_numpy(labels)) for _, labels in theirs)
    assert spread_of(points, self_maps.clusters(points, 5)) <= 1.002 * best


def test_fewer_distinct_points_than_clusters():
    labels = self_maps.clusters(torch.tensor([[0.0], [0.0], [0.0], [1.0], [1.0]]), 4)
    assert labels.tolist() == [0, 0, 0, 1, 1]
    assert self_maps.clusters(torch.zeros(4, 4), 16).tolist() == [0, 0, 0, 0]


def test_label_masks_are_the_labels_as_squares():
    labels = torch.tensor([0, 1, 1, 2, 0, 0])
    masks = self_maps.label_masks(labels, 4, (2, 3), (8, 12))
    assert masks.shape == (4, 8, 12) and torch.equal(masks.sum(0), torch.ones(8, 12))
    assert torch.equal(masks.argmax(0)[::4, ::4].flatten(), labels) and masks[3].sum() == 0
