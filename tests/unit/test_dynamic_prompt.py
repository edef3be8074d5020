"""Dynamic prompt learning: its losses against loops written from the formulas, its loop against the algorithm."""

import json
import math
from dataclasses import replace

import pytest
import torch

from attune.inversion import dynamic_prompt as dpl
from attune.inversion.ddim import step_down
from attune.inversion.dynamic_prompt import DynamicPrompt, Network, Progress, Task
from attune.inversion.null_text import NullText

# ---- losses ------------------------------------------------------------------------------------------------------


def maps(grid, tokens=77, seed=0):
    """Cross-attention (N, T) with rows that sum to 1, spread as a real one's."""
    generator = torch.Generator().manual_seed(seed)
    return (1.5 * torch.randn(grid[0] * grid[1], tokens, generator=generator)).softmax(-1)


def loop_balance(rows, nouns, grid):
    """L_at, pixel by pixel: a softmax over 100 * A without each chunk's first and last token, a 3x3 Gaussian with
    mirrored borders, and the noun whose greatest value is least."""
    height, width = grid
    g = [math.exp(-((i / (2 * 0.5)) ** 2)) for i in (-1, 0, 1)]
    total = sum(a * b for a in g for b in g)
    competing = [t for t in range(len(rows[0])) if t % 77 not in (0, 76)]
    worst = 0.0
    for noun in nouns:
        seen = []
        for row in rows:
            powers = {t: math.exp(100 * row[t]) for t in competing}
            seen.append(sum(powers[t] for t in noun) / sum(powers.values()))
        greatest = 0.0
        for y in range(height):
            for x in range(width):
                value = 0.0
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        v, u = abs(y + dy), abs(x + dx)
                        v, u = min(v, 2 * height - 2 - v), min(u, 2 * width - 2 - u)
                        value += g[dy + 1] * g[dx + 1] / total * seen[v * width + u]
                greatest = max(greatest, value)
        worst = max(worst, max(0.0, 1 - greatest))
    return worst


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def loop_maps(rows, nouns):
    return [[sum(row[t] for t in noun) for row in rows] for noun in nouns]


def loop_disjoint(rows, nouns):
    seen = loop_maps(rows, nouns)
    pairs = [cosine(seen[i], seen[j]) for i in range(len(seen)) for j in range(i)]
    return sum(pairs) / len(pairs)


def loop_background(rows, nouns, outside):
    seen = loop_maps(rows, nouns)
    return sum(cosine(m, o) for m, o in zip(seen, outside, strict=True)) / len(seen)


CASES = {
    "two": ((4, 4), 77, [(2,), (5,)]),
    "three, wide": ((3, 5), 77, [(2,), (5,), (7,)]),
    "four of several pieces": ((6, 2), 77, [(1, 2), (4,), (9, 10, 11), (75,)]),
    "two chunks": ((4, 4), 154, [(3,), (75, 78), (152,)]),
    "16x16": ((16, 16), 77, [(3,), (7, 8)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_formulas(case):
    grid, tokens, nouns = CASES[case]
    seen = maps(grid, tokens)
    outside = torch.rand(len(nouns), len(seen), generator=torch.Generator().manual_seed(1)).round()
    found = dpl.losses(DynamicPrompt(), seen, nouns, outside, grid)
    rows = seen.double().tolist()
    assert float(found["balance"]) == pytest.approx(loop_balance(rows, nouns, grid), abs=1e-5)
    assert float(found["disjoint"]) == pytest.approx(loop_disjoint(rows, nouns), abs=1e-5)
    assert float(found["background"]) == pytest.approx(loop_background(rows, nouns, outside.tolist()), abs=1e-5)


def test_the_start_and_the_last_token_do_not_compete():
    """And the end token and the padding do."""
    seen, nouns, grid = maps((4, 4)), [(2,), (5,)], (4, 4)
    plain = float(dpl.balance_loss(seen, nouns, grid))
    for token, moves in ((0, False), (76, False), (6, True), (75, True)):
        other = seen.clone()
        other[:, token] = 0.9
        assert (abs(float(dpl.balance_loss(other, nouns, grid)) - plain) > 1e-3) == moves


def test_it_is_the_least_seen_noun_that_counts():
    seen = torch.zeros(16, 77)
    seen[:, 2] = 0.9  # fills every place
    assert float(dpl.balance_loss(seen, [(2,), (5,)], (4, 4))) == pytest.approx(1, abs=1e-6)
    seen[:8] = 0
    seen[:8, 5] = 0.9
    assert float(dpl.balance_loss(seen, [(2,), (5,)], (4, 4))) < 1e-6


def test_the_gaussian_is_the_papers():
    """Attend-and-Excite's kernel: 0.332 in the middle, 0.122 at an edge, 0.045 at a corner."""
    dot = torch.zeros(1, 5, 5)
    dot[0, 2, 2] = 1
    kernel = dpl.smoothed(dot)[0, 1:4, 1:4]
    c, e, m = 0.0449, 0.1221, 0.3319
    assert torch.allclose(kernel, torch.tensor([[c, e, c], [e, m, e], [c, e, c]]), atol=1e-4)
    corner = torch.zeros(1, 3, 3)
    corner[0, 1, 1] = 1
    # In a corner the mirrored neighbour counts four times.
    assert float(dpl.smoothed(corner)[0, 0, 0]) == pytest.approx(4 * c, abs=4e-4)


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (6, 1)])
def test_a_grid_of_one_row(grid):
    seen = maps(grid)
    same = seen[:1].expand(len(seen), -1)
    assert float(dpl.balance_loss(same, [(2,), (5,)], grid)) == pytest.approx(
        1 - min(float((100 * same[0, 1:76]).softmax(-1)[t - 1]) for t in (2, 5)), abs=1e-5
    )
    assert math.isfinite(float(dpl.balance_loss(seen, [(2,), (5,)], grid)))


def test_what_counts():
    seen, grid, mask = maps((4, 4)), (4, 4), torch.ones(2, 16)
    two, one = [(2,), (5,)], [(2,)]

    def names(nouns, outside=mask, **weights):
        outside = outside if outside is None else outside[: len(nouns)]
        return set(dpl.losses(DynamicPrompt(**weights), seen, nouns, outside, grid))

    assert names(two) == {"balance", "disjoint", "background"}
    assert names(two, None) == {"balance", "disjoint"}
    assert names(one) == {"background"} and names(one, None) == set()
    assert names(two, balance=0) == {"disjoint", "background"}
    assert names(two, disjoint=0) == {"balance", "background"}
    assert names(two, background=0) == {"balance", "disjoint"}


def test_a_noun_that_may_look_everywhere_has_no_loss():
    seen = maps((4, 4)).requires_grad_()
    outside = torch.stack([torch.zeros(16), torch.ones(16)])
    loss = dpl.background_loss(dpl.noun_maps(seen, [(2,), (5,)]), outside)
    assert loss.item() == pytest.approx(loop_background(seen.tolist(), [(5,)], [[1] * 16]) / 2, abs=1e-6)
    loss.backward()
    assert seen.grad.isfinite().all() and seen.grad[:, 2].abs().max() == 0 < seen.grad[:, 5].abs().max()


@pytest.mark.parametrize("name", dpl.LOSSES)
def test_the_gradient_is_that_of_the_loss(name):
    grid, nouns = (3, 3), [(2, 3), (5,), (7,)]
    outside = torch.rand(3, 9, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    seen = (0.1 * maps(grid).double()).requires_grad_()  # small, so that no softmax is all but 0 or 1
    weight = {n: float(n == name) for n in dpl.LOSSES}

    def loss(p):
        return dpl.losses(DynamicPrompt(**weight), p, nouns, outside, grid)[name]

    assert torch.autograd.gradcheck(loss, seen, eps=1e-7, atol=1e-4, fast_mode=True)
    assert torch.autograd.grad(loss(seen), seen)[0].abs().max() > 1e-3


# ---- thresholds --------------------------------------------------------------------------------------------------


def test_thresholds_are_the_supplements():
    settings = DynamicPrompt()
    first, last = settings.thresholds(0, 50), settings.thresholds(49, 50)
    assert first == pytest.approx((0.300, 0.900, 0.700), abs=1e-12)
    assert last == pytest.approx((0.042, 0.127, 0.263), abs=5e-4)
    each = [settings.thresholds(i, 50) for i in range(50)]
    assert all(a > b for one, two in zip(each[:-1], each[1:], strict=True) for a, b in zip(one, two, strict=True))
    # In other schedules they fall over the same share of the steps.
    assert settings.thresholds(5, 10) == pytest.approx(settings.thresholds(25, 50))
    assert settings.thresholds(50, 100) == pytest.approx(settings.thresholds(25, 50))


# ---- learning ----------------------------------------------------------------------------------------------------

SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
GRID, LENGTH, WIDTHS = (4, 4), 77, {"l": 2, "g": 3}
NULL = torch.zeros(1, LENGTH, 5)
PICTURES = 2
NOUNS = [[(2,), (4, 5)], [(2,), (4, 5)]]


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WORDS = random(LENGTH, 5, seed=1)
KEYS, PLACES = random(5, 6, seed=2), random(2, 6, seed=3)
PATH = torch.stack([random(PICTURES, 2, *GRID, seed=4 + i) * (1 + s**2) ** 0.5 for i, s in enumerate(SIGMAS.tolist())])
OUTSIDE = [random(2, 16, seed=20 + i).gt(0).float() for i in range(PICTURES)]


def text(picture, vectors):
    """A prompt whose words read each other, with two text encoders' vectors for its nouns."""
    words = WORDS.clone()
    words[[2, 4, 5]] = torch.cat([vectors["l"], vectors["g"]], 1)
    return torch.tanh(words + words.cumsum(0) / 20)[None]


def look(x, sigma, texts, rows):
    places = (x / (1 + sigma**2) ** 0.5).flatten(2).transpose(1, 2) @ PLACES
    return (places @ (texts @ KEYS).transpose(1, 2)).softmax(-1)


def clean(x, sigma, texts, rows):
    return x - sigma * torch.tanh(x / (1 + sigma**2) ** 0.5 + 3 * texts.mean((1, 2)).view(-1, 1, 1, 1))


NETWORK = Network(text, look, clean, clean)
OWN = WORDS[[2, 4, 5]].expand(PICTURES, -1, -1)
START = {"l": OWN[..., :2].clone(), "g": OWN[..., 2:].clone()}
NULLS = NullText(3.0, inner=3)
SETTINGS = DynamicPrompt(inner=4, rate=0.02)


def ignore(*_):
    pass


def run(settings=SETTINGS, nulls=NULLS, pictures=(0, 1), progress=None, network=NETWORK, report=ignore, **task):
    """All :class:`Progress` of learning on some of the pictures."""
    pictures = list(pictures)
    path = PATH[:, pictures]
    it = {"nouns": [NOUNS[i] for i in pictures], "outside": [OUTSIDE[i] for i in pictures], "grid": GRID} | task
    start = {n: v[pictures] for n, v in START.items()}
    it = Task(**it)
    progress = progress or dpl.begin(path, it)
    return list(dpl.learn(settings, nulls, it, network, SIGMAS, path, start, NULL, progress, report))


def by_hand(settings, nulls, picture, outside=None):
    """Algorithm 1 for one picture, with the papers' code's order: look, stop or update, then the null embedding."""
    outside, nouns = OUTSIDE[picture] if outside is None else outside, NOUNS[picture]
    x, null = PATH[0, picture : picture + 1], NULL
    v = {n: START[n][picture].clone() for n in WIDTHS}
    vectors, found, embeddings, seen = [], [], [], torch.zeros(2, 2, 16)
    for i, (high, low) in enumerate(zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True)):
        at, dj, bg = (b * math.exp(-i * 50 / 4 / a) for b, a in zip(settings.beta, settings.alpha, strict=True))
        limits = {"balance": at, "disjoint": dj, "background": bg}
        v = {n: one.detach().clone().requires_grad_() for n, one in v.items()}
        adam = torch.optim.AdamW(v.values(), lr=settings.rate, betas=(0.9, 0.999), weight_decay=0.01)
        found.append([])
        for _ in range(settings.inner):
            probabilities = look(x, high, text(picture, v), None)[0]
            m = torch.stack([probabilities[:, list(n)].sum(1) for n in nouns])
            losses = {
                "balance": dpl.balance_loss(probabilities, nouns, GRID),
                "disjoint": (m[0] @ m[1]) / (m[0].norm() * m[1].norm()),
                "background": sum((a @ o) / (a.norm() * o.norm()) for a, o in zip(m, outside, strict=True)) / 2,
            }
            found[-1].append({n: loss.item() for n, loss in losses.items()})
            if all(found[-1][-1][n] < limit for n, limit in limits.items()):
                break
            adam.zero_grad()
            (
                settings.balance * losses["balance"]
                + settings.disjoint * losses["disjoint"]
                + settings.background * losses["background"]
            ).backward()
            adam.step()
        with torch.no_grad():
            ours = text(picture, v)
            for k, words in enumerate((text(picture, {n: START[n][picture] for n in WIDTHS}), ours)):
                probabilities = look(x, high, words, None)[0]
                seen[k] += torch.stack([probabilities[:, list(n)].sum(1) for n in nouns])
            toward = clean(x, high, ours, None)
        null = (null if nulls and nulls.warm else NULL).detach().clone().requires_grad_()
        if nulls:
            adam = torch.optim.Adam([null], lr=nulls.rate * (1 - i * 50 / 4 / 100))
            for _ in range(nulls.inner):
                away = clean(x, high, null, None)
                landed = x + (x - away - nulls.guidance * (toward - away)) * (low - high) / high
                loss = ((landed - PATH[i + 1, picture : picture + 1]) / (1 + low**2) ** 0.5).square().mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
                if loss.item() < nulls.tolerance + 2e-5 * i * 50 / 4:
                    break
            with torch.no_grad():
                away = clean(x, high, null, None)
                toward = away + nulls.guidance * (toward - away)
            embeddings.append(null.detach())
        x = x + (x - toward) * (low - high) / high
        vectors.append({n: one.detach().clone() for n, one in v.items()})
    return vectors, found, embeddings, x, seen


def words_of(losses, picture=0):
    """The words' losses of a picture, without those of null-text inversion."""
    return [[one for one in step[picture] if "null-text" not in one] for step in losses]


def agree(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert a.keys() == b.keys() and all(a[n] == pytest.approx(b[n], abs=2e-5) for n in a)


CHANGES = {
    "as it is": (SETTINGS, NULLS),
    "often": (replace(SETTINGS, inner=9), NULLS),
    "weights": (replace(SETTINGS, balance=0.1, disjoint=2.0, background=3.0), NULLS),
    "stops early": (replace(SETTINGS, inner=9, rate=0.05, beta=(1.01, 0.65, 1.01), alpha=(1e9, 13.0, 1e9)), NULLS),
    "cold": (SETTINGS, replace(NULLS, warm=False)),
    "no nulls": (SETTINGS, None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_the_papers_algorithm(change):
    settings, nulls = CHANGES[change]
    *_, ours = run(settings, nulls, [0])
    vectors, found, embeddings, x, seen = by_hand(settings, nulls, 0)
    agree(words_of(ours.losses), found)
    if change == "stops early":
        assert len({len(step) for step in found}) > 1 and max(map(len, found)) > 1
    for mine, theirs in zip(ours.vectors, vectors, strict=True):
        assert all(torch.allclose(mine[n][0], theirs[n], atol=1e-4) for n in WIDTHS)
    moved = max(float((vectors[-1][n] - START[n][0]).abs().max()) for n in WIDTHS)
    assert moved > 0.03  # what is compared is learned
    assert torch.allclose(ours.x, x, atol=1e-3) and torch.allclose(ours.seen[:, 0], seen, atol=1e-3)
    assert len(ours.nulls) == len(embeddings)
    for mine, theirs in zip(ours.nulls, embeddings, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_on_the_papers_timesteps_thresholds_count_the_step_at_0_as_null_text_inversion_does(monkeypatch):
    asked = []
    real = dpl.DynamicPrompt.thresholds
    monkeypatch.setattr(dpl.DynamicPrompt, "thresholds", lambda s, *given: asked.append(given) or real(s, *given))
    sigmas = SIGMAS.clone()
    sigmas[-1] = 0.03  # where the papers' own grid ends
    for settings in (SETTINGS, replace(SETTINGS, shared=True)):
        for levels, steps in ((SIGMAS, 4), (sigmas, 5)):
            asked.clear()
            task = Task([NOUNS[0]], [OUTSIDE[0]], GRID)
            start = {n: v[:1] for n, v in START.items()}
            path = PATH[:, :1]
            given = task, NETWORK, levels, path, start, NULL, dpl.begin(path, task), ignore
            list(dpl.learn(settings, NULLS, *given))
            assert asked == [(step, steps) for step in range(4)]


@pytest.mark.parametrize("nulls", [NULLS, None])
def test_one_vector_for_all_steps_stays_the_same_beside_null_embeddings(nulls):
    *_, done = run(replace(SETTINGS, shared=True), nulls)
    assert len(done) == 4 and len(done.nulls) == (4 if nulls else 0)
    for name, first in done.vectors[0].items():
        assert all(torch.equal(step[name], first) for step in done.vectors)
        assert not torch.equal(first, START[name])


def test_without_nulls_it_draws_without_guidance():
    steps, x = run(nulls=None), PATH[0]
    for i, progress in enumerate(steps):
        texts = torch.cat([text(p, {n: v[p] for n, v in progress.vectors[i].items()}) for p in range(PICTURES)])
        high, low = SIGMAS[i : i + 2].tolist()
        x = step_down(x, clean(x, high, texts, None), high, low)
        assert torch.allclose(progress.x, x, atol=1e-5) and progress.nulls == []
        assert all("null-text" not in one for step in progress.losses for picture in step for one in picture)
    assert "nulls" not in steps[-1].tensors()


def first_step(settings, **task):
    """Losses of the first picture at the first step."""
    return words_of(run(settings, None, [0], **task)[0].losses)[0]


@pytest.mark.parametrize("optimizer", dpl.OPTIMIZERS)
def test_each_optimizer_is_what_it_is_called(optimizer):
    settings = replace(SETTINGS, optimizer=optimizer, inner=1, rate=0.1, beta=(0, 0, 0))
    moved = run(settings, None, [0])[0].vectors[0]
    given = {n: START[n][0].clone().requires_grad_() for n in WIDTHS}
    seen = look(PATH[0, :1], 8.0, text(0, given), None)[0]
    parts = dpl.losses(settings, seen, NOUNS[0], OUTSIDE[0], GRID)
    sum(w * parts[n] for n, w in zip(dpl.LOSSES, settings.weights, strict=True)).backward()
    for n, v in given.items():
        change = {
            dpl.DESCENT: -0.1 * v.grad,
            dpl.ADAM: -0.1 * v.grad / (v.grad.abs() + 1e-8),
            dpl.ADAMW: -0.1 * 0.01 * v - 0.1 * v.grad / (v.grad.abs() + 1e-8),
        }[optimizer]
        assert torch.allclose(moved[n][0] - v.detach(), change.detach(), atol=1e-5)
        assert change.abs().max() > 1e-4


def test_a_loss_on_its_threshold_goes_on():
    """It must be below; and every loss must."""
    only = replace(SETTINGS, balance=0.0, disjoint=0.0, alpha=(1.0, 1.0, 1e9))
    (value,) = first_step(replace(only, inner=1))[0].values()
    above = math.nextafter(value, 1)
    assert len(first_step(replace(only, beta=(0, 0, value)))) > 1
    assert len(first_step(replace(only, beta=(0, 0, above)))) == 1
    both = replace(only, disjoint=0.05)
    assert len(first_step(replace(both, beta=(0, 1.1, above)))) == 1
    assert len(first_step(replace(both, beta=(0, 0.0, above)))) == SETTINGS.inner


def test_nothing_is_updated_where_all_is_well():
    told = []
    settings = replace(SETTINGS, beta=(1.1, 1.1, 1.1), alpha=(1e9,) * 3)
    *_, last = run(settings, None, report=lambda *all: told.append(all))
    assert told == []
    for vectors in last.vectors:
        assert all(torch.equal(vectors[n], START[n]) for n in WIDTHS)
    assert torch.equal(last.seen[0], last.seen[1])
    assert [[len(picture) for picture in step] for step in last.losses] == [[1, 1]] * 4


def test_vectors_are_carried_over_and_the_optimizer_is_not():
    """Adam's first update moves by the rate whatever the gradient; with its momenta kept, the second would not."""
    settings = replace(SETTINGS, inner=1, optimizer=dpl.ADAM, rate=1e-3, beta=(0, 0, 0))
    *_, last = run(settings, None, [0])
    each = [{n: START[n][:1] for n in WIDTHS}, *last.vectors]
    for before, after in zip(each[:-1], each[1:], strict=True):
        moves = torch.cat([(after[n] - before[n]).abs().flatten() for n in WIDTHS])
        assert torch.allclose(moves, torch.full_like(moves, 1e-3), rtol=1e-2)


def test_one_noun_has_the_background_alone():
    task = {"nouns": [[(2,)]], "outside": [OUTSIDE[0][:1]]}
    found = run(replace(SETTINGS, beta=(0, 0, 0)), None, [0], **task)[-1]
    assert all(one.keys() == {"background"} for step in words_of(found.losses) for one in step)
    assert found.seen.shape == (2, 1, 1, 16)
    losses = words_of(found.losses)[0]
    assert losses[-1]["background"] < losses[0]["background"]


@pytest.mark.parametrize("left_out", ["balance", "disjoint", "background"])
def test_a_weight_of_0_leaves_a_loss_out(left_out):
    """It neither moves the vectors nor keeps the loop going."""
    others = [n for n in dpl.LOSSES if n != left_out]
    settings = replace(SETTINGS, **{left_out: 0.0}, beta=tuple(0.0 if n == left_out else 1.1 for n in dpl.LOSSES))
    assert [set(one) for one in first_step(settings)] == [set(others)]


def test_pictures_are_independent_and_stop_on_their_own():
    settings, nulls = CHANGES["stops early"][0], replace(NULLS, tolerance=0.3)
    *_, both = run(settings, nulls)
    counts = [[len(one) for one in words_of(both.losses, i)] for i in range(PICTURES)]
    assert counts[0] != counts[1]
    for i in range(PICTURES):
        *_, alone = run(settings, nulls, [i])
        agree(words_of(both.losses, i), words_of(alone.losses))
        assert [len(step[i]) for step in both.losses] == [len(step[0]) for step in alone.losses]
        for a, b in zip(both.vectors, alone.vectors, strict=True):
            assert all(torch.allclose(a[n][i], b[n][0], atol=1e-4) for n in WIDTHS)
        assert torch.allclose(torch.stack(both.nulls)[:, i], torch.stack(alone.nulls)[:, 0], atol=1e-4)
        assert torch.allclose(both.seen[:, i], alone.seen[:, 0], atol=1e-3)


@pytest.mark.parametrize("nulls", [NULLS, None], ids=["nulls", "no nulls"])
@pytest.mark.parametrize("done", [1, 3])
def test_it_goes_on_where_it_stopped(nulls, done):
    """From what a file keeps, to the same bits."""
    whole = run(nulls=nulls)
    kept = {name: t.clone() for name, t in whole[done - 1].tensors().items()}
    back = Progress.restored(kept, json.loads(json.dumps(whole[done - 1].losses)))
    assert len(back) == done
    rest = run(nulls=nulls, progress=back)
    assert len(rest) == 4 - done
    first, second = whole[-1].tensors(), rest[-1].tensors()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert whole[-1].losses == rest[-1].losses


def test_what_it_reports():
    """Every update with the losses it was made from, averaged over the pictures still learning."""
    told = []
    progress = run(replace(SETTINGS, beta=(0, 0, 0)), report=lambda *all: told.append(all))[-1]
    words = [(step, update, losses) for step, update, losses, *_ in told if "null-text" not in losses]
    assert [(s, u) for s, u, _ in words] == [(s, u) for s in range(4) for u in range(SETTINGS.inner)]
    for step, update, losses in words:
        for name, value in losses.items():
            assert value == pytest.approx(sum(progress.losses[step][i][update][name] for i in range(2)) / 2)
    rest = [one for one in told if "null-text" in one[2]]
    assert len(rest) == sum("null-text" in one for step in progress.losses for one in step[0]) > 4
    assert all(clean.shape == x.shape for *_, clean, x in rest)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it(value):
    def bad(x, sigma, texts, rows):
        seen = look(x, sigma, texts, rows)
        return seen * value if sigma < 3 else seen

    done = []
    task = Task(NOUNS, OUTSIDE, GRID)
    learning = dpl.learn(
        SETTINGS, None, task, replace(NETWORK, look=bad), SIGMAS, PATH, START, NULL, dpl.begin(PATH, task), ignore
    )
    with pytest.raises(FloatingPointError, match="step 3"):
        for progress in learning:
            done.append(progress)
    assert len(done) == 2


def test_what_is_given_is_left_alone():
    before = {n: v.clone() for n, v in START.items()}, PATH.clone()
    *_, last = run()
    assert all(torch.equal(START[n], v) and not START[n].requires_grad for n, v in before[0].items())
    assert torch.equal(PATH, before[1])
    kept = last.tensors()
    assert not any(t.requires_grad for t in kept.values())
    assert kept["vectors.l"].shape == (4, 2, 3, 2) and kept["vectors.g"].shape == (4, 2, 3, 3)
