from dataclasses import replace

import pytest
import torch

from attune.inversion.ddim import CURRENT, LATER, epsilon, invert, papers_sigmas, placed
from attune.inversion.negative_prompt import between
from attune.inversion.trajectory import Trajectory, check_same_model, text_distance, weight_distance

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
BAR = torch.cumprod(1 - BETAS, 0)
SIGMAS = ((1 - BAR) / BAR).sqrt().float()


def ignore(*_):
    pass


def network(z, t):
    """Stands for a UNet in the papers' terms: some smooth noise prediction from a latent and a timestep."""
    return torch.tanh(z * 1.3 + t / 500) * 0.8


def denoise(x, sigma):
    t = int((SIGMAS - sigma).abs().argmin())
    return x - sigma * network(x / (1 + sigma**2) ** 0.5, t)


def test_papers_grid():
    grid = papers_sigmas(SIGMAS, 50)
    assert len(grid) == 50 and torch.equal(grid, SIGMAS[torch.arange(980, -1, -20)])


def test_inversion_is_the_papers_ddim():
    """Against the papers' formula in their own coordinates, eps(z_low, t_high), all the way up."""
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = list(range(0, 1000, 20))
    # The picture is taken to lie at t = 0 as it is; the papers' latent there is smaller by sqrt(abar).
    path = invert(lambda x, s: denoise(x.double(), s), z.float(), papers_sigmas(SIGMAS, 50), LATER, 0.03, ignore)
    z = z * BAR[0].sqrt()
    for low, high in zip(times[:-1], times[1:], strict=True):
        eps = network(z, high)
        clean = (z - (1 - BAR[low]).sqrt() * eps) / BAR[low].sqrt()
        z = BAR[high].sqrt() * clean + (1 - BAR[high]).sqrt() * eps
    assert torch.allclose(path[0].double() * BAR[980].sqrt(), z, atol=2e-4)


@pytest.mark.parametrize("where", [LATER, CURRENT])
def test_shape_order_and_picture(where):
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.0])
    picture = torch.randn(2, 4, 3, 5)
    seen = []
    path = invert(denoise, picture, sigmas, where, 0.03, lambda step, clean, x: seen.append(step))
    assert path.shape == (4, 2, 4, 3, 5) and path.dtype == torch.float32 and path.isfinite().all()
    assert torch.equal(path[-1], picture) and seen == [0, 1, 2]


def test_a_gaussian_is_inverted_as_theory_says():
    """For data N(0, 1) the perfect denoiser is x / (1 + s^2), and the way up multiplies by sqrt(1 + s^2)."""
    sigmas = torch.cat([torch.logspace(1, -2, 4000), torch.zeros(1)])
    picture = torch.ones(1, 1, 1, 1)
    path = invert(lambda x, s: x / (1 + s**2), picture, sigmas, CURRENT, 1e-3, ignore)
    assert torch.allclose(path[:, 0, 0, 0, 0], (1 + sigmas**2).sqrt(), rtol=2e-3)


def test_epsilon_at_its_own_level_is_the_plain_one():
    x = torch.randn(1, 4, 2, 2)
    assert torch.allclose(epsilon(denoise, x, 2.0, 2.0), (x - denoise(x, 2.0)) / 2.0)


HEADER = {"family": "SD15 (UNetModel)", "latent_format": "SD15", "prediction": "EPS", "weights": [0.5, -0.25, 0.125]}


def made_with(**header):
    return Trajectory(torch.zeros(2), torch.zeros(2, 1, 4, 2, 2), 1, {**HEADER, **header})


def test_same_model_in_half_precision_is_the_same():
    assert not check_same_model(made_with(), {**HEADER, "weights": [0.5002, -0.25, 0.1251]})


DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("ours", DTYPES)
@pytest.mark.parametrize("theirs", DTYPES)
def test_rounding_keeps_weights_the_same_and_hides_no_other_ones(ours, theirs):
    """Down to numbers so small that fp8 has only a few for them."""
    random = torch.Generator().manual_seed(0)
    scale = torch.logspace(-6, 1, 500)
    weights, others = (torch.randn(500, generator=random) * scale for _ in range(2))

    def header(values, dtype):
        return {"dtype": dtype, "weights": [], "probes": values.to(getattr(torch, dtype)).tolist()}

    assert weight_distance(header(weights, ours), header(weights, theirs)) == 0
    assert weight_distance(header(weights, ours), header(others, theirs)) > 0.2


def test_what_cannot_be_read_is_not_compared():
    """Of quantised weights; where nothing can be read nothing says that it is another model."""
    one = {"weights": [], "probes": [0.5, None, 0.25], "dtype": "float32"}
    assert weight_distance(one, {**one, "probes": [0.5, 3.0, None]}) == 0
    assert weight_distance(one, {**one, "probes": [None, 3.0, None]}) == 0
    assert weight_distance(one, {**one, "probes": [0.5, None]}) == 1
    assert weight_distance(one, {**one, "probes": [-0.5, None, 0.25]}) == pytest.approx(0.5)


SAMPLING = {"sampling": "EPS", "timesteps": [0.0, 500.0, 999.0]}


@pytest.mark.parametrize(
    "made,now,told",
    [
        ({}, SAMPLING, ""),  # by an older version
        (SAMPLING, SAMPLING, ""),
        (SAMPLING, {**SAMPLING, "timesteps": [19.0, 510.0, 999.0]}, ""),
        (SAMPLING, {**SAMPLING, "timesteps": [0.0, 450.0, 900.0]}, "has other noise levels since"),
        (SAMPLING, {**SAMPLING, "sampling": "LCM"}, "has LCM sampling in the place of EPS since"),
        ({}, {"weights": [0.52, -0.25, 0.125]}, "weights are a little off"),
    ],
)
def test_what_is_nearly_the_same_model_is_told(made, now, told):
    said = check_same_model(made_with(**made), {**HEADER, **now})
    assert told in said and bool(told) == bool(said)


def test_texts_of_one_caption():
    text = torch.randn(1, 77, 8)
    trajectory = Trajectory(torch.zeros(2), torch.zeros(2, 1, 4, 2, 2), 1, HEADER, [[text, {}]])
    assert text_distance(trajectory, [[text.clone(), {}]]) == 0
    assert text_distance(trajectory, [[text * 1.5, {}]]) == pytest.approx(0.5)
    # Longer or other texts are not compared.
    assert text_distance(trajectory, [[text.repeat(1, 2, 1), {}]]) == text_distance(trajectory, [[text, {}]] * 2) == 0
    assert text_distance(replace(trajectory, conditioning=[]), []) == 0


@pytest.mark.parametrize(
    "change,word",
    [
        ({"weights": [0.5, 0.25, 0.1]}, "checkpoint"),
        ({"latent_format": "SDXL"}, "SDXL"),
        ({"prediction": "V_PREDICTION"}, "V_PREDICTION"),
        ({"family": "SDXL (UNetModel)", "weights": []}, "SDXL"),
    ],
)
def test_another_model_is_refused(change, word):
    with pytest.raises(ValueError, match=word):
        check_same_model(Trajectory(torch.zeros(2), torch.zeros(2, 1, 4, 2, 2), 1, HEADER), {**HEADER, **change})


# ---- a negative between caption and empty text ---------------------------------------------------------------------


def test_texts_between_two_lie_on_the_arc_and_its_ends():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5), torch.randn(1, 3, 5)
    assert torch.equal(between(a, b, 0.0), a) and torch.equal(between(a, b, 1.0), b.expand_as(a))
    ones, twos = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    third = between(ones, twos, 1 / 3)  # 30 degrees of a right angle
    assert torch.allclose(third, torch.tensor([[[3**0.5 / 2, 0.5]]]), atol=1e-6)
    assert torch.allclose(between(ones, 3 * ones, 0.5), 2 * ones)  # no arc between two that point the same way
    assert between(a.half(), b, 0.5).dtype == torch.float16


def test_a_picture_lies_at_its_last_level_as_the_papers_have_it():
    picture = torch.randn(1, 4, 2, 2)
    assert torch.equal(placed(picture, 0.0), picture)
    assert torch.allclose(placed(picture, 0.75) / (1 + 0.75**2) ** 0.5, picture)
