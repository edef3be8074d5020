"""The benchmark's metrics on cases whose answer is known. Networks are tiny, of random weights, and read from a folder
as a user's would be."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from attune.benchmark import metrics, networks
from attune.benchmark.datasets import Sample


def flat(value, height=32, width=48):
    return torch.full((3, height, width), value)


def noise(seed, height=32, width=48):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def left(height=32, width=48):
    """A mask of what is kept: the left half."""
    kept = torch.zeros(height, width, dtype=torch.bool)
    kept[:, : width // 2] = True
    return kept


def save(path, picture):
    """A picture (3, H, W) in 0..1 or a mask (H, W) bool as PNG."""
    picture = picture.movedim(0, -1) if picture.ndim == 3 else picture.float()
    Image.fromarray((picture.numpy() * 255).round().astype(np.uint8)).save(path)
    return path


# ---- without networks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, left()])
@pytest.mark.parametrize("whole", [True, False])
def test_equal_pictures_are_equal(kept, whole):
    one = noise(0)
    assert metrics.mse(one, one, kept, whole) == metrics.l1(one, one) == 0
    assert metrics.psnr(one, one, kept, whole) == metrics.CEILING
    assert metrics.ssim(one, one, kept, whole) == pytest.approx(1, abs=1e-9)


def test_an_offset_has_the_error_that_it_has():
    one, other = flat(0.3), flat(0.5)
    assert metrics.mse(one, other) == pytest.approx(0.04, rel=1e-5)
    assert metrics.l1(one, other) == pytest.approx(0.2, rel=1e-5)
    assert metrics.psnr(one, other) == pytest.approx(-10 * math.log10(0.04), rel=1e-5)


def test_the_edited_area_is_black_in_both_and_counted_unless_told():
    kept = left()
    one, other = flat(0.3), torch.where(kept, flat(0.5), flat(0.9))
    assert metrics.mse(one, other, kept) == pytest.approx(0.02, rel=1e-5)  # half of the picture is 0 in both
    assert metrics.mse(one, other, kept, whole=False) == pytest.approx(0.04, rel=1e-5)
    assert metrics.psnr(one, other, kept) == pytest.approx(-10 * math.log10(0.02), rel=1e-5)
    assert metrics.psnr(one, other, kept, whole=False) == pytest.approx(-10 * math.log10(0.04), rel=1e-5)


def test_similarity_of_flat_pictures_is_the_closed_form():
    c1 = 0.01**2
    expected = (2 * 0.3 * 0.5 + c1) / (0.3**2 + 0.5**2 + c1)
    assert metrics.ssim(flat(0.3), flat(0.5)) == pytest.approx(expected, rel=1e-5)
    # Far from the edge the kept half is flat, the edited one equal; only windows across the edge are in between.
    kept = left(64, 256)
    one, other = flat(0.3, 64, 256), flat(0.5, 64, 256)
    assert metrics.ssim(one, other, kept) == pytest.approx((1 + expected) / 2, abs=0.01)
    assert metrics.ssim(one, other, kept, whole=False) == pytest.approx(expected, abs=0.01)
    assert abs(1 - expected) > 0.1


def test_similarity_falls_with_noise():
    one = noise(0)
    worse = [metrics.ssim(one + amount * (noise(1) - 0.5), one) for amount in (0.1, 0.3, 1.0)]
    assert 1 > worse[0] > worse[1] > worse[2]


def test_overlap_curve():
    shares = torch.zeros(1, 4, 4)
    shares[0, :2] = 1.0
    shares[0, 2] = 0.5
    true = torch.zeros(1, 4, 4, dtype=torch.bool)
    true[0, :2] = True
    # Twice as large a map is the same one; at 0.5 the third row no longer counts, since more than that is asked for.
    for scale in (1, 2):
        found = metrics.iou_curve(scale * shares, true, [0.0, 0.4, 0.5, 0.9, 1.0])
        assert found.tolist() == pytest.approx([8 / 12, 8 / 12, 1, 1, 0])
    both = torch.cat([shares, 3 * shares]), torch.cat([true, ~true])
    assert metrics.iou_curve(*both, [0.5]).tolist() == pytest.approx([0.5])
    assert metrics.iou_curve(torch.zeros(1, 4, 4), true, [0.5]).tolist() == [0]


def test_clip_figures_of_given_embeddings():
    one, other, between = torch.tensor([1.0, 0]), torch.tensor([0, 1.0]), torch.tensor([0.6, 0.8])
    assert metrics.clip_score(one, between) == pytest.approx(60)
    assert metrics.clip_score(one, -between) == 0
    assert metrics.clip_score(one, -between, floor=False) == pytest.approx(-60)
    assert metrics.clip_direction(one, other, one, other) == pytest.approx(1)
    assert metrics.clip_direction(one, other, other, one) == pytest.approx(-1)
    assert metrics.clip_direction(one, -one, other, -other) == pytest.approx(0, abs=1e-7)
    assert metrics.clip_direction(one, one, one, other) is None and metrics.clip_direction(one, other, one, one) is None


# ---- networks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of all networks as a user would have it, small and untrained."""
    import torchvision
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("networks")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ids = {"vocab_size": len(vocabulary), "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    looks = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    reads = CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[])
    for name in (networks.CLIP_LARGE, networks.CLIP_BASE):
        vision = small | {"image_size": 32, "patch_size": 8}
        CLIPModel(CLIPConfig(text_config=small | ids, vision_config=vision, projection_dim=8)).save_pretrained(
            where / name.split("/")[1]
        )
        CLIPProcessor(looks, reads).save_pretrained(where / name.split("/")[1])
    for name, patch in ((networks.DINO_B8, 32), (networks.DINO_S16, 32)):
        layout = small | {"num_hidden_layers": 12, "image_size": 224, "patch_size": patch}
        ViTModel(ViTConfig(**layout), add_pooling_layer=False).save_pretrained(where / name.split("/")[1])
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), where / networks.SQUEEZENET)
    return where


@pytest.fixture(scope="module")
def every(folder):
    """All columns."""
    return metrics.Metrics(folder)


@pytest.fixture(scope="module")
def found(every):
    return every.networks


@torch.inference_mode()
def test_perceptual_distance(found):
    network, one, other, kept = found.squeezenet, noise(0, 64, 64), noise(1, 64, 64), left(64, 64)
    assert metrics.lpips(network, one, one) == 0
    distance = metrics.lpips(network, one, other)
    assert distance > 0.01 and metrics.lpips(network, other, one) == pytest.approx(distance, rel=1e-5)
    # What is edited counts for nothing, wherever it is averaged.
    for whole in (True, False):
        same = torch.where(kept, one, other)
        assert metrics.lpips(network, one, same, kept, whole) == 0
        assert metrics.lpips(network, one, other, kept, whole) > 0.01
    everything = torch.ones(64, 64, dtype=torch.bool)
    assert metrics.lpips(network, one, other, everything) == pytest.approx(distance, rel=1e-5)
    near = distance, metrics.lpips(network, one, other, kept, whole=False)
    assert near[1] > metrics.lpips(network, one, other, kept)  # the mean over all of it has the black half in it
    assert near[1] == pytest.approx(near[0], rel=0.3)


def test_black_is_minus_one_to_the_perceptual_network():
    class Seen(torch.nn.Module):
        def forward(self, ours, theirs):
            self.given = ours, theirs
            return torch.zeros(1, 1, *ours.shape[2:]) if self.spatial else torch.zeros(1, 1, 1, 1)

    network, kept = Seen(), left()
    metrics.lpips(network, flat(1.0), flat(0.5), kept)
    ours, theirs = network.given
    assert ours[..., kept].unique() == 1 and theirs[..., kept].unique() == 0
    assert ours[..., ~kept].unique() == theirs[..., ~kept].unique() == -1


def test_the_perceptual_layers_are_the_published_ones(found):
    """As torchmetrics, whose copy PIE-Bench's numbers are made with, has them."""
    from pathlib import Path

    from torchmetrics.functional.image import lpips

    published = torch.load(Path(lpips.__file__).parent / "lpips_models" / "squeeze.pth", map_location="cpu")
    mine = found.squeezenet.state_dict()
    assert len(published) == 7 and all(torch.equal(mine[name], weight) for name, weight in published.items())
    theirs = torch.load(found.find(networks.SQUEEZENET))
    assert torch.equal(mine["net.slice1.0.weight"], theirs["features.0.weight"])
    assert torch.equal(mine["net.slice7.12.expand3x3.weight"], theirs["features.12.expand3x3.weight"])


def test_the_perceptual_distance_is_torchmetrics_one(found, folder, monkeypatch):
    """An independent build on the same weights gives the same number."""
    import torchvision
    from torchmetrics.functional.image import lpips

    weights = torch.load(folder / networks.SQUEEZENET)

    def features(net, pretrained=False):
        model = torchvision.models.squeezenet1_1(weights=None)
        model.load_state_dict(weights)
        return model.features

    monkeypatch.setattr(lpips, "_get_tv_model_features", features)
    one, other = noise(0, 64, 64), noise(1, 64, 64)
    with torch.inference_mode():
        theirs = lpips.learned_perceptual_image_patch_similarity(
            one[None] * 2 - 1, other[None] * 2 - 1, net_type="squeeze"
        )
        assert metrics.lpips(found.squeezenet, one, other) == pytest.approx(float(theirs), rel=1e-4)


def keys_of(network, picture, peak, antialias):
    """The keys of layer 11 of every head, (heads, T, d), written out from the layers' parts."""
    from torchvision.transforms import Normalize, Resize

    small = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(
        Resize(224, max_size=480, antialias=antialias)(picture * peak)
    )
    hidden = network.embeddings(small[None], interpolate_pos_encoding=True)
    for layer in network.layers[:11]:
        hidden = layer(hidden)
    last = network.layers[11]
    keys = last.attention.k_proj(last.layernorm_before(hidden))[0]
    return keys.unflatten(-1, (network.config.num_attention_heads, -1)).movedim(1, 0)


@pytest.mark.parametrize("peak, antialias", [(255.0, False), (1.0, True)])
@torch.inference_mode()
def test_structure_distance(found, peak, antialias):
    network, one, other = found.dino(networks.DINO_B8), noise(0, 256, 256), noise(1, 256, 256)
    quirks = {"peak": peak, "antialias": antialias}
    assert metrics.structure_distance(network, one, one, **quirks) == 0
    selves = []
    for picture in (one, other):
        keys = keys_of(network, picture, peak, antialias)
        product = torch.einsum("hsd,htd->st", keys, keys)
        length = torch.einsum("hsd,hsd->s", keys, keys).sqrt()
        selves.append(product / (length[:, None] * length))
    expected = float((selves[0] - selves[1]).square().mean())
    assert expected > 1e-5
    measured = metrics.structure_distance(network, one, other, **quirks)
    assert measured == pytest.approx(expected, rel=1e-3)
    if peak == 255:
        assert metrics.structure_distance(network, one, other) == measured  # the published way is the usual one
    changed = metrics.structure_distance(network, one, other, **quirks | {"peak": 256.0 - peak})
    assert abs(changed / measured - 1) > 0.05


@torch.inference_mode()
def test_embeddings_are_of_length_one_and_of_what_they_are_of(found):
    model, processor = found.clip(networks.CLIP_LARGE)
    pictures, texts = metrics.embed(model, processor, [noise(0), noise(1, 64, 64)], ["a cat", "a dog and a cat"])
    assert pictures.shape == texts.shape == (2, 8)
    assert torch.allclose(torch.cat([pictures, texts]).norm(dim=1), torch.ones(4), atol=1e-5)
    again = metrics.embed(model, processor, [noise(1, 64, 64)], ["a cat"])
    assert torch.allclose(again[0][0], pictures[1], atol=1e-5) and torch.allclose(again[1][0], texts[0], atol=1e-5)
    long = metrics.embed(model, processor, [noise(0)], ["cat " * 200])[1]
    assert long.isfinite().all()
    one = metrics.embed_by_dino(found.dino(networks.DINO_S16), noise(0, 40, 60))
    assert one.shape == (16,) and float(one.norm()) == pytest.approx(1, abs=1e-5)


# ---- all of them -------------------------------------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path):
    return Sample(
        "one", "colour", "a cat", "a dog",
        picture=save(tmp_path / "source.png", flat(0.2, 64, 64)),
        mask=save(tmp_path / "mask.png", ~left(64, 64)),
        truth=save(tmp_path / "truth.png", flat(0.4, 64, 64)),
    )  # fmt: skip


def test_every_column(sample, every, tmp_path):
    assert set(every.why_not) <= set(metrics.SETS)  # their package is seldom installed
    edited = save(tmp_path / "edited.png", torch.where(left(64, 64), flat(0.4, 64, 64), flat(0.8, 64, 64)))
    row = every.measure(sample, edited)
    assert tuple(row) == every.names == tuple(metrics.COLUMNS) and all(isinstance(v, float) for v in row.values())
    step = 51 / 255  # 0.2 in a PNG
    assert row["MSE"] == pytest.approx(step**2 / 2, rel=1e-4) and row["MSE kept"] == pytest.approx(step**2, rel=1e-4)
    assert row["PSNR"] == pytest.approx(-10 * math.log10(step**2 / 2), rel=1e-4)
    assert row["PSNR kept"] == pytest.approx(-10 * math.log10(step**2), rel=1e-4)
    assert row["L1"] == pytest.approx(step, rel=1e-4)  # the right half alone, by 0.4
    assert row["L2"] == pytest.approx(2 * step**2, rel=1e-4)
    assert row["LPIPS kept"] > row["LPIPS"] > 0 and row["structure distance"] > 0
    assert row["CLIP score"] >= 0 and row["CLIP score edited"] >= 0
    assert -1 <= row["CLIP direction"] <= 1 and -1 <= row["CLIP-T"] <= 1
    same = every.measure(sample, sample.truth)
    assert same["L1"] == same["L2"] == 0 and same["CLIP-I"] == pytest.approx(1, abs=1e-5)
    assert same["DINO"] == pytest.approx(1, abs=1e-5) and row["DINO"] < 1 - 1e-5


@torch.inference_mode()
def test_the_edited_area_alone_is_scored(sample, every, tmp_path):
    inside, (model, processor) = ~left(64, 64), every.networks.clip(networks.CLIP_LARGE)
    edited = save(tmp_path / "edited.png", noise(0, 64, 64))
    shown = metrics.open_picture(edited) * inside
    texts = list("abcdefgh")
    (inner, whole), told = metrics.embed(model, processor, [shown, metrics.open_picture(edited)], texts)
    best = int((told @ inner).argmax())
    row = every.measure(Sample(**vars(sample) | {"target": texts[best]}), edited)
    assert row["CLIP score edited"] == pytest.approx(100 * float(told[best] @ inner), abs=1e-3)
    assert row["CLIP score edited"] > 0.1
    assert row["CLIP score"] == pytest.approx(max(0.0, 100 * float(told[best] @ whole)), abs=1e-3)
    assert abs(row["CLIP score"] - row["CLIP score edited"]) > 0.01


BACKGROUND = {f"{name}{part}" for name in ("PSNR", "MSE", "SSIM", "LPIPS") for part in ("", " kept")}


@pytest.mark.parametrize(
    "changes, absent",
    [
        ({}, set()),
        ({"mask": None}, BACKGROUND | {"CLIP score edited"}),
        ({"mask": "everything"}, BACKGROUND),  # PIE-Bench's "nan"
        ({"mask": "nothing"}, {"CLIP score edited"}),
        ({"source": ""}, {"CLIP direction"}),
        ({"source": "a dog"}, {"CLIP direction"}),
        ({"truth": None}, {"L1", "L2", "CLIP-I", "DINO"}),
    ],
)
def test_what_a_sample_has_not_is_none(sample, every, tmp_path, changes, absent):
    if isinstance(changes.get("mask"), str):
        mask = torch.full((64, 64), changes["mask"] == "everything")
        changes = {"mask": save(tmp_path / "changed.png", mask)}
    other = Sample(**vars(sample) | changes)
    row = every.measure(other, save(tmp_path / "edited.png", noise(0, 64, 64)))
    assert {name for name, value in row.items() if value is None} == absent


def test_a_picture_of_another_size_is_resized(sample, tmp_path):
    row = metrics.Metrics(None).measure(sample, save(tmp_path / "large.png", flat(0.4, 96, 80)))
    assert row["L1"] == pytest.approx(0, abs=1e-6)
    assert row["PSNR kept"] == pytest.approx(-10 * math.log10((51 / 255) ** 2), rel=1e-3)


def test_the_caption_of_the_true_edit_is_the_local_one_where_there_is_one(sample, every, tmp_path):
    edited = save(tmp_path / "edited.png", noise(0, 64, 64))
    local = Sample(**vars(sample) | {"extras": {"local caption": "zz zz zz"}})
    renamed = Sample(**vars(sample) | {"target": "zz zz zz"})
    rows = [every.measure(one, edited)["CLIP-T"] for one in (sample, local, renamed)]
    assert rows[1] == rows[2] != rows[0]


def test_missing_networks_are_told_and_the_rest_is_measured(sample, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    free = {"PSNR", "MSE", "SSIM", "PSNR kept", "MSE kept", "SSIM kept", "L1", "L2"}
    some = metrics.Metrics(tmp_path / "mine")
    assert set(some.names) - set(some.why_not) == free == set(some.measure(sample, sample.truth))
    for name, (needed, _) in metrics.COLUMNS.items():
        if name not in free:
            assert needed in some.why_not[name] and str(tmp_path / "mine") in some.why_not[name]
            assert some.why_not[name].count(". ") == 0 and some.why_not[name].endswith(".")
    assert "mine" not in metrics.Metrics(None).why_not["DINO"]
    # One that is not whole is not taken.
    (tmp_path / "mine" / "dino-vits16").mkdir(parents=True)
    (tmp_path / "mine" / "dino-vits16" / "config.json").write_text("{}")
    assert "DINO" in metrics.Metrics(tmp_path / "mine").why_not


def test_missing_packages_are_told(folder, monkeypatch):
    find = networks.importlib.util.find_spec
    monkeypatch.setattr(
        networks.importlib.util, "find_spec", lambda name: None if name in ("lpips", "torchmetrics") else find(name)
    )
    why = metrics.Metrics(folder).why_not
    assert set(why) - set(metrics.SETS) == BACKGROUND - {"MSE", "MSE kept"}
    assert "package lpips is not installed" in why["LPIPS"] and "torchmetrics" in why["SSIM"]


def test_success_is_for_the_demo_world_alone(sample):
    assert metrics.demo_success(sample, sample.truth) is None


# ---- sets of pictures --------------------------------------------------------------------------------------------


def features(seed, count=400, width=6, scale=1.0, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def test_the_frechet_distance_of_known_gaussians():
    """Equal sets have none; a shift adds its square; a scale of all features D (1 - s)^2 of their variance."""
    one = features(0)
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(one, one + 3) == pytest.approx(6 * 9, rel=1e-5)
    spread = float(one.double().var(0).sum())
    assert metrics.frechet_distance(one, 2 * (one - one.mean(0)) + one.mean(0)) == pytest.approx(spread, rel=1e-5)
    few = features(1, count=3)  # of no full rank
    assert metrics.frechet_distance(few, few + 1) == pytest.approx(6, rel=1e-4)
    with pytest.raises(ValueError, match="needs two pictures"):
        metrics.frechet_distance(one[:1], one)


def test_the_frechet_distance_is_scipys():
    linalg, numpy = pytest.importorskip("scipy.linalg"), np
    one, other = features(0).double(), (features(1) @ features(2, 6)).double()
    a, b = numpy.cov(one.T), numpy.cov(other.T)
    apart = ((one.mean(0) - other.mean(0)) ** 2).sum()
    known = float(apart) + numpy.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert metrics.frechet_distance(one, other) == pytest.approx(known, rel=1e-6)


def test_the_inception_score_counts_the_classes_that_are_seen():
    sure = 100 * torch.eye(4)
    assert metrics.inception_score(sure) == pytest.approx(4)
    assert metrics.inception_score(sure[:1].expand(5, 4)) == pytest.approx(1)
    assert metrics.inception_score(torch.zeros(5, 4)) == pytest.approx(1)


def test_whole_sets_are_measured_by_a_network_that_is_there(tmp_path, monkeypatch):
    """Its features are the mean colour here, of pictures 0.25 brighter than their sources."""
    made = metrics.Metrics(tmp_path)
    made.why_not = {}
    made.networks.inception = lambda pixels: (pixels.double().mean((2, 3)) / 255, pixels.double().mean((2, 3)))
    sources = [save(tmp_path / f"{n}.png", flat(n / 10)) for n in range(3)]
    edits = [save(tmp_path / f"{n} edit.png", flat(n / 10 + 0.25)) for n in range(3)]
    found = made.measure_set(list(zip(sources, edits, strict=True)))
    assert found["FID"] == pytest.approx(3 * 0.25**2, abs=0.01) and found["IS"] == pytest.approx(1)
    assert made.measure_set([(sources[0], edits[0])]) == {"FID": None, "IS": None}
    assert made.measure_set([(None, edit) for edit in edits])["FID"] is None
    made.why_not = {"FID": "", "IS": ""}
    assert made.measure_set([(sources[0], edits[0])]) == {}
