"""Null-text inversion's loop against its definition, on a network small enough to see through."""

import pytest
import torch

from attune.inversion.ddim import draw, invert, step_down
from attune.inversion.direct import pull
from attune.inversion.null_text import NullText, begin, learn, papers_count
from attune.inversion.report import Row, fit, leaves, psnr, structural_similarity, table, verdict

SIGMAS = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
TEXT, NULL = torch.full((1, 2, 3), 0.7), torch.zeros(1, 2, 3)


def predict(x, sigma, text):
    shift = text.mean((1, 2)).view(-1, 1, 1, 1)
    return x - sigma * torch.tanh(x / (1 + sigma**2) ** 0.5 + shift)


def denoise(x, sigma, embedding=None, rows=None):
    return predict(x, sigma, TEXT if embedding is None else embedding)


def ignore(*_):
    pass


@pytest.fixture
def latents():
    picture = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return invert(denoise, picture, SIGMAS, "later level (papers' code)", 0.03, ignore)


def run(latents, **kwargs):
    settings = NullText(3.0, **kwargs)
    *_, last = learn(settings, denoise, SIGMAS, latents, NULL, begin(latents), ignore)
    return last


def by_hand(latents, warm=True, inner=10, tolerance=1e-5, guidance=3.0):
    """The algorithm as the paper prints it, one picture, in the papers' scale."""
    x, embedding, nulls, losses = latents[0], NULL, [], []
    for step in range(len(SIGMAS) - 1):
        high, low, i = SIGMAS[step], SIGMAS[step + 1], 50 * step / (len(SIGMAS) - 1)
        embedding = (embedding if warm else NULL).detach().clone().requires_grad_()
        adam = torch.optim.Adam([embedding], lr=1e-2 * (1 - i / 100))
        losses.append([])
        for _ in range(inner):
            empty, clean = predict(x, high, embedding), predict(x, high, TEXT)
            guided = empty + guidance * (clean - empty)
            eps = (x - guided) / high
            loss = torch.nn.functional.mse_loss((x + (low - high) * eps) / (1 + low**2) ** 0.5,
                                                latents[step + 1] / (1 + low**2) ** 0.5)  # fmt: skip
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses[-1].append(loss.item())
            if loss.item() < tolerance + 2e-5 * i:
                break
        with torch.no_grad():
            empty, clean = predict(x, high, embedding), predict(x, high, TEXT)
            x = x + (low - high) * (x - (empty + guidance * (clean - empty))) / high
        nulls.append(embedding.detach())
    return nulls, losses, x


@pytest.mark.parametrize("settings", [{}, {"warm": False}, {"inner": 3}, {"tolerance": 0.01}], ids=str)
def test_it_is_the_papers_algorithm(latents, settings):
    ours = run(latents[:, :1], **settings)
    nulls, losses, x = by_hand(latents[:, :1], **settings)
    assert torch.allclose(torch.stack(ours.nulls), torch.stack(nulls), atol=1e-5)
    for (mine,), theirs in zip(ours.losses, losses, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert torch.allclose(ours.x, x, atol=1e-4)


def test_pictures_stop_on_their_own(latents):
    both = run(latents, tolerance=0.02)
    for i in range(2):
        one = run(latents[:, i : i + 1], tolerance=0.02)
        assert [len(step[i]) for step in both.losses] == [len(step[0]) for step in one.losses]
        assert torch.allclose(torch.stack(both.nulls)[:, i], torch.stack(one.nulls)[:, 0], atol=1e-5)


def test_it_goes_on_where_it_stopped(latents):
    whole = list(learn(NullText(3.0), denoise, SIGMAS, latents, NULL, begin(latents), ignore))
    rest = list(learn(NullText(3.0), denoise, SIGMAS, latents, NULL, whole[1], ignore))
    assert len(rest) == 3 and torch.equal(torch.stack(rest[-1].nulls), torch.stack(whole[-1].nulls))


def test_a_loss_that_is_not_finite_ends_it(latents):
    with pytest.raises(FloatingPointError, match="step 1"):
        run(latents * float("inf"))


def test_embeddings_that_break_down_in_the_last_update_are_told(latents):
    """No loss is computed after it, so where it leads to has to tell."""

    def broken(x, sigma, embedding=None, rows=None):
        last = embedding is not None and not torch.is_grad_enabled()
        return denoise(x, sigma, embedding) * (float("nan") if last else 1)

    with pytest.raises(FloatingPointError, match="what step 1 learned is not a finite number"):
        next(learn(NullText(3.0, inner=1), broken, SIGMAS, latents, NULL, begin(latents), ignore))


def test_direct_pulls_as_told(latents):
    free = draw(denoise, latents[0], SIGMAS, ignore)
    assert torch.equal(pull(denoise, SIGMAS, latents, 1, 1.0, ignore), latents)
    assert torch.equal(pull(denoise, SIGMAS, latents, 1, 0.0, ignore), free)
    half = pull(denoise, SIGMAS, latents, 1, 0.5, ignore)
    expected = step_down(half[1], denoise(half[1], 4.0), 4.0, 2.0)
    assert torch.allclose(half[2], expected + 0.5 * (latents[2] - expected))
    third = pull(denoise, SIGMAS, latents, 3, 1.0, ignore)
    pinned = [torch.equal(a, b) for a, b in zip(third, latents, strict=True)]
    assert pinned == [True, True, False, False, True, False]


def test_refinement_turns_the_step_round(latents):
    picture = latents[-1]
    up = invert(denoise, picture, SIGMAS, "current level", 0.03, ignore, refine=60)
    back = draw(denoise, up[0], SIGMAS, ignore)
    assert (back[-1] - picture).abs().max() < 1e-3
    plain = draw(denoise, invert(denoise, picture, SIGMAS, "current level", 0.03, ignore)[0], SIGMAS, ignore)
    assert (plain[-1] - picture).abs().max() > 0.01


# ---- report ------------------------------------------------------------------------------------------------------


def pictures(noise):
    torch.manual_seed(1)
    true = torch.rand(2, 32, 40, 3) * 0.5 + 0.25
    return true, (true + noise * torch.randn(true.shape)).clamp(0, 1)


def test_measures_with_known_answers():
    true, off = pictures(0.1)
    assert psnr(true, true) == 100 and psnr(true, true + 0.1) == pytest.approx(20, abs=1e-3)
    assert psnr(off, true) == pytest.approx(20, abs=0.3)
    assert structural_similarity(true, true) == pytest.approx(1, abs=1e-4)
    assert 0.2 < structural_similarity(off, true) < 0.9


def test_an_image_is_cut_as_the_vae_cuts_it():
    image = torch.rand(1, 35, 43, 4)
    assert torch.equal(fit(image, torch.zeros(2, 32, 40, 3))[1], image[0, 1:33, 1:41, :3])
    for shape in ((1, 31, 40, 3), (3, 32, 40, 3), (1, 32, 400, 3)):
        with pytest.raises(ValueError, match="connect the image that was inverted"):
            fit(torch.zeros(shape), torch.zeros(2, 32, 40, 3))


def test_verdicts_can_be_acted_on():
    true, good = pictures(0.03)
    bad, poor = pictures(0.2)[1], pictures(0.3)[1]
    drift = torch.tensor([0.0, 0.01, 0.04, 0.2, 0.4])
    vae = Row("VAE alone", good)

    def said(ceiling, plain, led, learned=False):
        rows = Row("guidance 1", plain, drift), Row("guidance 7.5", led, drift)
        assert len(table(ceiling, rows, true).splitlines()) == 5
        return verdict(ceiling, *rows, 7.5, learned, true)

    assert said(vae, good, good) == "At guidance 7.5 the picture comes back as well as the VAE lets it."
    assert "drifts from step 3 of 4 on" in said(vae, good, bad) and "Use null-text" in said(vae, good, bad)
    assert "More inner steps" in said(vae, good, bad, learned=True)
    assert "a refinement or two" in said(vae, bad, bad) and "null-text" not in said(vae, bad, bad)
    assert "The VAE cannot hold this detail" in said(Row("VAE alone", poor), poor, poor)
    assert leaves(torch.tensor([0.0, 0.01, 0.03])) == 2 and leaves(torch.tensor([0.2, 0.2])) == 1


@pytest.mark.parametrize("steps", [10, 50, 125, 500, 1000])
def test_rate_and_early_stop_run_over_any_number_of_steps_as_over_50(steps):
    settings = NullText()
    first, last = (settings.schedule(step, steps) for step in (0, steps - 1))
    assert first == (0.01, 1e-5)
    assert 0.005 < last[0] < 0.0056 and 9e-4 < last[1] < 1.01e-3
    if steps == 50:  # the papers' own, to the bit
        assert [settings.schedule(i, 50) for i in range(50)] == [
            (0.01 * (1 - i / 100), 1e-5 + 2e-5 * i) for i in range(50)
        ]


def test_the_papers_grid_counts_its_step_at_0():
    assert papers_count([3.0, 1.0, 0.0]) == 2
    assert papers_count([3.0, 1.0, 0.03]) == 3


def test_a_tolerance_of_0_never_stops_early(latents):
    assert all(len(one) == 10 for step in run(latents, tolerance=0.0).losses for one in step)
    assert all(len(one) == 1 for step in run(latents, tolerance=100.0).losses for one in step)


def test_more_than_a_hundred_steps_are_learned():
    """The papers' code would go down at a rate of 0 and less from the 101st step on."""
    sigmas = torch.cat([torch.linspace(3, 0.02, 125), torch.zeros(1)])
    latents = torch.randn(126, 1, 4, 2, 2, generator=torch.manual_seed(0)) * sigmas[:, None, None, None, None]
    *_, done = learn(NullText(3.0, inner=1), denoise, sigmas, latents, NULL, begin(latents), ignore)
    assert len(done) == 125 and done.x.isfinite().all()
    assert all((a != b).any() for a, b in zip(done.nulls, done.nulls[1:], strict=False))
