"""The benchmark of learned words: its scenes leak as they should, and its figures are what they say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from attune.benchmark import dynamic_prompt as benchmark
from attune.demo import scenes
from attune.demo.measure import Bench
from attune.demo.model import WEIGHTS
from attune.inversion.dynamic_prompt import DynamicPrompt


def test_scenes_leak_in_their_way_and_were_never_shown():
    for i, one in enumerate(benchmark.draw_scenes(6, 0, benchmark.TEST)):
        first, second = one.things
        assert scenes.is_held_out(one) and (first.color, first.shape) != (second.color, second.shape)
        assert i % 3 != 0 or first.color == second.color
        assert i % 3 != 1 or first.shape == second.shape
        assert (one.texture > 0.1) == (i % 3 == 2)


def test_parts_draw_other_scenes_and_a_seed_the_same():
    captions = [
        {scenes.caption(s) for s in benchmark.draw_scenes(5, 0, part)}
        for part in (benchmark.TUNING, benchmark.TEST, benchmark.SWAPS)
    ]
    again = {scenes.caption(s) for s in benchmark.draw_scenes(5, 0, benchmark.TUNING)}
    assert captions[0] == again
    assert all(len(a & b) < 2 for i, a in enumerate(captions) for b in captions[:i])


def test_overlap_counts_pixels():
    maps = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = (torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.6).float()
    batch = benchmark.Batch([], [], [], None, [masks], None)
    found = benchmark.overlaps(batch, maps)[0]
    for at, threshold in enumerate(benchmark.THRESHOLDS.tolist()):
        expected = []
        for map_, mask in zip(maps[0].numpy(), masks.numpy(), strict=True):
            above = map_ / map_.max() > np.float32(threshold)
            expected.append((above & (mask > 0.5)).sum() / max(1, (above | (mask > 0.5)).sum()))
        assert float(found[at]) == pytest.approx(np.mean(expected), abs=1e-6)
    assert found[-1] == 0  # nothing is above the greatest value


def test_summary_compares_each_method_at_its_own_best():
    steps = len(benchmark.THRESHOLDS)
    base, better = torch.zeros(60, steps), torch.zeros(60, steps)
    base[:, 10] = 0.5
    better[:, 20] = 0.5 + 0.2 * torch.rand(60, generator=torch.Generator().manual_seed(0))
    found = benchmark.summary({benchmark.NULL_TEXT: base, "better": better})
    low, high = found["better"]["95 % interval"]
    gain = float((better[:, 20] - 0.5).mean())
    error = float(better[:, 20].std()) / 60**0.5
    assert found["better"]["above null-text"] == pytest.approx(gain, abs=1e-4)
    assert low == pytest.approx(gain - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(gain + 1.96 * error, abs=0.3 * error)
    assert found[benchmark.NULL_TEXT]["95 % interval"] == [0.0, 0.0]


@pytest.mark.parametrize("what", ["color", "shape"])
def test_the_truth_passes_and_the_source_does_not(what):
    rng = np.random.default_rng(3)
    right = wrong = 0
    for source in benchmark.draw_scenes(4, 0, benchmark.SWAPS):
        goal = benchmark.exchanged(source, what, rng)
        (truth, _), (before, masks) = scenes.render(goal), scenes.render(source)
        truth, before, masks = torch.from_numpy(truth), torch.from_numpy(before), torch.from_numpy(masks)
        for thing, mask in zip(goal.things, masks, strict=True):
            right += benchmark.told(truth, thing, what, mask)
            wrong += benchmark.told(before, thing, what, mask)
        _, _, outside, whole, similar = benchmark.mark(truth, goal, what, before, truth, masks)
        assert whole == pytest.approx(100) and similar == pytest.approx(1, abs=1e-4) and outside > 25
    assert right >= 7 and wrong == 0


# ---- a user's own pictures ---------------------------------------------------------------------------------------


def write(path, numbers):
    Image.fromarray((np.asarray(numbers) * 255).round().astype(np.uint8)).save(path)


def braced(scene):
    caption = scenes.caption(scene)
    for thing in scene.things:
        caption = caption.replace(f" {thing.shape}", f" {{{thing.shape}}}", 1)
    return caption


@pytest.fixture
def written(tmp_path):
    """Two demo scenes as a user has them: pictures, masks, and captions with the nouns in braces; one shape in each."""
    drawn = [benchmark.draw_scenes(9, 0, benchmark.TEST)[i] for i in (0, 2)]
    entries = []
    for number, scene in enumerate(drawn):
        picture, masks = scenes.render(scene)
        names = [f"{number}_{i}.png" for i in range(len(masks))]
        for name, numbers in ((f"{number}.png", picture), *zip(names, masks, strict=True)):
            write(tmp_path / name, numbers)
        entries.append({"picture": f"{number}.png", "caption": braced(scene), "masks": names})
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(entries))
    return drawn, path, entries


@pytest.fixture(scope="module")
def small():
    with torch.inference_mode():
        return Bench(2, 0, 3, 7.5)


def test_own_pictures_give_the_curves_of_the_scenes_that_they_show(small, written, monkeypatch):
    """The same figures as the built-in way, which is shown the pictures in a file's 256 levels too: that alone moves
    the IoU at a threshold by up to 0.003, as a picture token more or less passes it."""
    drawn, path, _ = written
    render = scenes.render

    def rounded(scene):
        picture, masks = render(scene)
        return (picture * 255).round().astype(np.float32) / 255, masks

    monkeypatch.setattr(scenes, "render", rounded)
    monkeypatch.setattr(benchmark, "draw_scenes", lambda *_: drawn)
    monkeypatch.setattr(benchmark, "KINDS", benchmark.KINDS[:2])  # of which each needs a scene
    settings, wanted = DynamicPrompt(inner=1, rate=0.03), (benchmark.ALL, benchmark.MASKED)
    want, curves = benchmark.curve(small, 2, settings, 2, wanted)
    pictures = benchmark.read_own(path, small.clip)
    found, own = benchmark.curve(small, 2, settings, 2, wanted, pictures)
    assert set(own) == {benchmark.DDIM, benchmark.NULL_TEXT, *wanted} == set(curves)
    for name, values in curves.items():
        assert own[name] == pytest.approx(values, abs=1e-3), name
        assert max(values) > 0.2  # it is not that nothing was found
    assert found["all"][benchmark.ALL]["best IoU"] == pytest.approx(want["all"][benchmark.ALL]["best IoU"], abs=1e-3)
    assert set(found) == {"all", "thresholds", "IoU"} and set(want) - set(found) == set(benchmark.KINDS)


def test_own_pictures_of_several_kinds_are_not_mixed(small, written):
    """A batch has one size and one number of nouns; nouns may lie deep in a caption, and be three."""
    _, path, entries = written
    first, second = entries
    wide = Image.open(path.with_name("1.png")).resize((192, 128))
    wide.save(path.with_name("wide.png"))
    masks = []
    for i in range(3):
        mask = np.zeros((128, 192))
        mask[32:96, 64 * i : 64 * i + 48] = 1
        write(path.with_name(f"wide_{i}.png"), mask)
        masks.append(f"wide_{i}.png")
    text = "a picture that somebody made of very many things on a gray background, a {circle} beside a {square} and a "
    third = {"picture": "wide.png", "caption": text + "{star}", "masks": masks}
    path.write_text(json.dumps([first, second, third]))
    batches = list(benchmark.own_batches(small, benchmark.read_own(path, small.clip), 4))
    assert [len(batch.captions) for batch in batches] == [2, 1]
    last = batches[1]
    assert last.seen.shape[:2] == (1, 3) and last.tokens > 20 and last.outside[0].shape[0] == 3
    seen = benchmark.learned_maps(small, last, DynamicPrompt(inner=1, rate=0.01))
    assert seen.shape == last.seen.shape and benchmark.overlaps(last, seen).shape == (1, 51)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"picture": "none.png"}, "names .*none.png, which is no picture"),
        ({"caption": "a circle and a square"}, "has a caption that cannot be used: .* marks no noun"),
        ({"caption": "a {circle} and a square"}, "has 1 nouns in braces and 2 masks"),
        ({"masks": ["0_0.png"]}, "has 2 nouns in braces and 1 masks"),
        ({"masks": ["0_0.png", "small.png"]}, "has the mask small.png of 64x64, but a picture of 128x128"),
        ({"masks": ["0_0.png", "black.png"]}, "has the mask black.png that is all black"),
        ({"picture": "odd.png"}, "has a picture of 100x128, but both sides"),
        ({"masks": None}, "needs a path as picture"),
    ],
)
def test_what_a_manifest_lacks_is_said(small, written, change, what):
    _, path, entries = written
    write(path.with_name("small.png"), np.eye(64))
    write(path.with_name("black.png"), np.zeros((128, 128)))
    write(path.with_name("odd.png"), np.zeros((128, 100, 3)))
    path.write_text(json.dumps([entries[1], entries[0] | change]))
    with pytest.raises(ValueError, match=f"Entry 2 of manifest.json {what}"):
        benchmark.read_own(path, small.clip)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no list of pictures"):
        benchmark.read_own(path, small.clip)


def test_the_command_keeps_a_user_s_figures_apart(written, tmp_path, monkeypatch):
    _, path, entries = written
    path.write_text(json.dumps(entries[:1]))
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(WEIGHTS.read_bytes())
    before = benchmark.RESULTS.read_bytes()
    monkeypatch.setattr(benchmark, "RUN", tmp_path / "run")
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    line = f"x curve --checkpoint {mine} --data {path} --steps 2 --looks 1 --only"
    monkeypatch.setattr("sys.argv", [*line.split(), benchmark.ALL])
    benchmark.main()
    found = json.loads((tmp_path / "run" / "dynamic_prompt_manifest_mine.json").read_text())
    assert found["settings"]["scenes"] == 1 and found["settings"]["rate"] == 0.01
    assert set(found["IoU"]) == {benchmark.DDIM, benchmark.NULL_TEXT, benchmark.ALL}
    with Image.open(tmp_path / "run" / "dynamic_prompt_manifest_mine.png") as picture:
        assert picture.size == (640, 400)
    assert benchmark.RESULTS.read_bytes() == before
    monkeypatch.setattr("sys.argv", ["x", "curve", "--checkpoint", str(mine)])
    with pytest.raises(SystemExit):
        benchmark.main()
