"""Whether a sampling begins on the source's trajectory, and what is said where it does not."""

import pytest
import torch

from attune.attention_patches.reference import Reference
from attune.attention_patches.start import adds_noise, off_trajectory

SIGMAS = torch.tensor([14.6, 9.0, 4.0, 1.0, 0.0])
LATENTS = torch.randn(5, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * SIGMAS.view(-1, 1, 1, 1, 1).clamp(1)
SOURCE = Reference("source", SIGMAS, LATENTS, [], 4)


def said(x, sigma=14.6, sigmas=SIGMAS, noise_added=False, reference=SOURCE):
    text = off_trajectory(reference, x, sigma, sigmas, noise_added)
    assert text is None or text.count(". ") == 0 and text.endswith(".")  # one sentence
    return text


@pytest.mark.parametrize("first", range(4))
def test_nothing_is_said_on_the_trajectory(first):
    """From any of its levels on, to any, also where the sampler goes to 0 at the end and in half precision."""
    x = LATENTS[first].half().float()
    for last in range(first + 2, 6):
        assert said(x, float(SIGMAS[first]), SIGMAS[first:last]) is None
        ended = torch.cat([SIGMAS[first : last - 1], torch.zeros(1)])
        assert said(x, float(SIGMAS[first]), ended) is None


def test_noise_that_leads_to_the_trajectory_is_right():
    assert said(LATENTS[0], noise_added=True) is None


def test_one_source_for_a_batch():
    one = Reference("source", SIGMAS, LATENTS[:, :1], [], 4)
    assert said(LATENTS[0, :1].expand(3, -1, -1, -1), reference=one) is None
    assert "another latent" in said(LATENTS[0], reference=one)  # the second picture has its own noise


def test_each_mistake_has_its_sentence():
    noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 14.6
    assert "add_noise off" in said(LATENTS[0] + noise, noise_added=True)
    assert "empty LATENT" in said(torch.zeros(2, 4, 3, 3))
    assert "another latent" in said(noise)
    fewer = torch.tensor([11.5, 5.0, 0.0])  # the inverted noise, at the first level of a shorter schedule
    text = said(LATENTS[0], 11.5, fewer)
    assert "sigma 11.5 with the latent" in text and "at sigma 14.6" in text and "fewer steps" in text
    text = said(LATENTS[0], 14.6, SIGMAS[::2])
    assert "takes 2 steps at other sigmas than the 4 steps" in text


def test_an_edit_that_another_sampler_began_goes_on():
    """Part of the way down nothing tells the edit's own latent from a stranger's, but these mistakes still show."""
    begun = LATENTS[1] + torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    assert said(begun, 9.0, SIGMAS[1:]) is None
    assert "add_noise off" in said(begun, 9.0, SIGMAS[1:], noise_added=True)
    assert "at sigma 14.6" in said(LATENTS[0], 9.0, SIGMAS[1:])
    assert "takes 2 steps at other sigmas" in said(begun, 9.0, SIGMAS[[1, 3, 4]])


def test_a_method_that_starts_elsewhere_is_held_to_its_own_start():
    begin = LATENTS[0].flip(1)
    mixed = Reference("source", SIGMAS, LATENTS, [], 4, begin=begin)
    assert said(begin, reference=mixed) is None
    assert "another latent" in said(LATENTS[0].flip(2), reference=mixed)


def sample_still(model, x, sigmas, s_churn=0.0, s_noise=1.0):
    pass


def sample_ancestral(model, x, sigmas, eta=1.0, s_noise=1.0, noise_sampler=None):
    pass


def sample_lcm(model, x, sigmas, noise_sampler=None):
    pass


def sample_res_multistep(model, x, sigmas, s_noise=1.0, noise_sampler=None):
    pass


def sample_adaptive(model, x, sigmas, **extra_options):
    pass


@pytest.mark.parametrize(
    ("sampler", "settings", "noisy"),
    [
        (sample_still, {}, False),
        (sample_still, {"s_churn": 5.0}, True),
        (sample_still, {"s_churn": 5.0, "s_noise": 0.0}, False),
        (sample_ancestral, {}, True),
        (sample_ancestral, {"eta": 0.0}, False),
        (sample_ancestral, {"s_noise": 0.0}, False),
        (sample_lcm, {}, True),
        (sample_res_multistep, {}, False),
        (sample_adaptive, {}, False),
        (sample_adaptive, {"eta": 1.0}, True),
    ],
)
def test_samplers_that_add_noise(sampler, settings, noisy):
    assert adds_noise(sampler, settings) is noisy
