"""The benchmark's runner on real servers: it draws the same whoever draws it, and nothing is lost or done twice."""

import dataclasses
import io
import json
import logging
import os
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from attune.benchmark import datasets, prompts, runner, servers
from attune.tests import host
from attune.tests.unit import test_datasets as written

METHODS = "autoencoder", "sdedit_0_5", "p2p_ddim"
SETUP = prompts.Setup(steps=2)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    found, problems = datasets.read("demo", tmp_path_factory.mktemp("data"), count=1)
    assert not problems
    return [sample for sample in found if sample.kind in ("colour", "remove")]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A method that the server refuses to run."""
    method = json.loads((prompts.FOLDER / "sdedit_0_5.json").read_text(encoding="utf-8"))
    file = tmp_path_factory.mktemp("methods") / "broken.json"
    workflow = (prompts.FOLDER / method["workflow"]).read_text(encoding="utf-8").replace('"euler"', '"no sampler"')
    (file.parent / method["workflow"]).write_text(workflow, encoding="utf-8")
    file.write_text(json.dumps(method), encoding="utf-8")
    return prompts.read_method(str(file))


def open_run(out, samples, *methods):
    return runner.Run(out, samples, [*map(prompts.read_method, METHODS), *methods], SETUP)


def lines_of(run):
    return [json.loads(line) for line in (run.out / "drawn.jsonl").read_text(encoding="utf-8").splitlines()]


def pictures_of(run):
    return {task: run.picture(task).read_bytes() for task in run.digests if run.is_drawn(task)}


@pytest.fixture(scope="module")
def by_one(server, samples, broken, tmp_path_factory):
    """What one server draws."""
    run = open_run(tmp_path_factory.mktemp("one"), samples, broken)
    runner.draw(run, [server.url], ray="")
    return run


def test_a_picture_that_fails_is_told_and_the_others_are_drawn(by_one, samples):
    failed = [line for line in lines_of(by_one) if "failed" in line]
    assert {(line["sample"], line["method"]) for line in failed} == {(sample.key, "broken") for sample in samples}
    assert all("no sampler" in line["failed"] and "\n" not in line["failed"] for line in failed)
    drawn = pictures_of(by_one)
    assert set(drawn) == {(sample.key, method) for sample in samples for method in METHODS}
    for (key, method), content in drawn.items():
        sample = by_one.samples[key]
        got, source = (np.asarray(Image.open(f).convert("RGB"), float) for f in (io.BytesIO(content), sample.picture))
        assert got.shape == (128, 128, 3)
        if method == "autoencoder":
            assert np.abs(got - source).mean() < 8  # of 255; the sample's own picture, and no other


def busy(server):
    return bool(server.get("/queue")["queue_running"])


def kill_when_busy(server, kill):
    """Kills once the server is at work, from a thread of its own."""

    def wait():
        while not busy(server):
            time.sleep(0.01)
        kill()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_killed_server_costs_no_picture(by_one, server, samples, tmp_path, caplog):
    run = open_run(tmp_path, samples)
    with host.Server(host.Host.current()) as other, caplog.at_level(logging.WARNING):
        killer = kill_when_busy(other, lambda: os.killpg(other.process.pid, signal.SIGKILL))
        runner.draw(run, [other.url, server.url], ray="")
        killer.join(1)
        assert not killer.is_alive()
    assert f"{other.url} was lost" in caplog.text
    good = {task: content for task, content in pictures_of(by_one).items()}
    assert pictures_of(run) == good
    assert len(lines_of(run)) == len(good)


def test_a_killed_actor_of_ray_costs_no_picture(by_one, server, samples, tmp_path):
    ray = pytest.importorskip("ray")
    run = open_run(tmp_path, samples)
    groups, after = run.groups()
    with servers.on_ray("local", [server.url, server.url]) as crew:
        pids = ray.get([worker.actor.process.remote() for worker in crew])
        killer = kill_when_busy(server, lambda: [ray.kill(worker.actor, no_restart=False) for worker in crew])
        servers.Crew(groups, run.make, run.keep, after=after).work(crew)
        killer.join(1)
        assert not killer.is_alive()
        now = ray.get([worker.actor.process.remote() for worker in crew])
    assert len({*pids, *now, os.getpid()}) == 5
    assert pictures_of(run) == pictures_of(by_one)
    assert len(lines_of(run)) == len(run.digests)


def test_a_run_that_was_stopped_goes_on(by_one, server, samples, tmp_path):
    run = open_run(tmp_path, samples)
    runner.draw(run, [server.url], ray="")
    before = (run.out / "drawn.jsonl").read_bytes()
    about = (run.out / runner.SERVERS).read_bytes()
    assert json.loads(about)["ComfyUI"] and json.loads(about)["servers"] == 1
    runner.draw(open_run(tmp_path, samples), ["http://127.0.0.1:1"], ray="")  # asks no server
    assert (run.out / "drawn.jsonl").read_bytes() == before and (run.out / runner.SERVERS).read_bytes() == about

    lost = samples[1].key, "p2p_ddim"
    run.picture(lost).unlink()
    with (run.out / "drawn.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"sample": "colour')  # the power went here
    run = open_run(tmp_path, samples)
    assert run.groups()[0] == [[lost]]
    runner.draw(run, [server.url], ray="")
    assert pictures_of(run) == pictures_of(by_one)
    added = (run.out / "drawn.jsonl").read_bytes()[len(before) :].splitlines()[1:]
    assert [json.loads(line)["method"] for line in added] == ["p2p_ddim"]

    changes = {"sdedit_0_5": {"KSampler/cfg": 2.0}}
    changed = dataclasses.replace(SETUP, changes=changes)
    run = runner.Run(tmp_path, samples, [prompts.read_method(name) for name in METHODS], changed)
    assert run.groups()[0] == [[(sample.key, "sdedit_0_5")] for sample in samples]


def test_a_turn_goes_on_from_the_result_of_the_one_before(by_one, server, samples, tmp_path):
    first = samples[0]
    second = dataclasses.replace(first, key="second", turn=2, previous=first.key)
    run = runner.Run(tmp_path / "turns", [first, second], [prompts.read_method("autoencoder")], SETUP)
    assert run.groups() == ([[(first.key, "autoencoder"), ("second", "autoencoder")]],
                            {("second", "autoencoder"): (first.key, "autoencoder")})  # fmt: skip
    runner.draw(run, [server.url], ray="")
    again = dataclasses.replace(first, key="again", picture=run.picture((first.key, "autoencoder")))
    other = runner.Run(tmp_path / "again", [again], [prompts.read_method("autoencoder")], SETUP)
    runner.draw(other, [server.url], ray="")
    one, two = (Image.open(r.picture((key, "autoencoder"))) for r, key in ((run, "second"), (other, "again")))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != Image.open(run.picture((first.key, "autoencoder"))).tobytes()


def test_without_a_server_the_sentence_says_what_is_left(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "PAUSES", (0.01,))
    run = open_run(tmp_path, samples)
    with pytest.raises(host.HostError, match=r"No ComfyUI server is left \(http://127.0.0.1:1: .*; 6 pictures"):
        runner.draw(run, ["http://127.0.0.1:1"], ray="")


def test_a_picture_that_breaks_off_costs_its_sample_only(samples, tmp_path):
    Image.effect_noise((300, 300), 50).save(tmp_path / "broken.jpg")
    whole = (tmp_path / "broken.jpg").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    broken = dataclasses.replace(samples[0], key="broken", picture=tmp_path / "broken.jpg")
    next_turn = dataclasses.replace(samples[0], key="next", previous="broken")
    run = open_run(tmp_path, [broken, next_turn, *samples])
    assert len(run.problems) == 1 and "Sample broken" in run.problems[0]
    assert {key for key, _ in run.digests} == {sample.key for sample in samples}
    assert set(run.not_applicable.values()) == {"the turn before it is not drawn"}


def test_where_there_is_no_ray_cluster_a_sentence_says_so(samples, tmp_path):
    for address in ("127.0.0.1:1", "nowhere"):
        with pytest.raises(host.HostError, match=f'There is no Ray cluster at "{address}"'):
            runner.draw(open_run(tmp_path, samples), ["http://127.0.0.1:1"], ray=address)


class Fragile:
    """A worker that one task kills, and that comes back each time."""

    name, losses = "fragile", 0

    def draw(self, job):
        self.losses += job == "deadly"
        return (servers.LOST, "gone") if job == "deadly" else (servers.DRAWN, b"")

    def answers(self):
        return True


def test_a_picture_that_kills_every_server_is_given_up(monkeypatch):
    monkeypatch.setattr(servers, "PAUSES", (0.0,))
    told = {}
    crew = servers.Crew(
        [["deadly", "well"], ["fine"]], lambda task: task, lambda task, *outcome: told.update({task: outcome})
    )
    workers = Fragile(), Fragile()
    crew.work(workers)
    assert sum(worker.losses for worker in workers) == servers.CHANCES
    assert {task: outcome[1] for task, outcome in told.items()} == {
        "deadly": servers.FAILED, "well": servers.DRAWN, "fine": servers.DRAWN,
    }  # fmt: skip


def test_the_whole_command(server, tmp_path):
    """Draws, measures and shows; a second time it measures and draws nothing."""
    asked = ["--count", "1", "--methods", "truth", "cpam_removal", "--steps", "2", "--servers", server.url]
    runner.main([*asked, "--out", str(tmp_path)])
    measured = (tmp_path / "measured.jsonl").read_bytes()
    lines = [json.loads(line) for line in measured.splitlines()]
    assert [line["method"] for line in lines].count("truth") == 8
    assert [line["method"] for line in lines].count("cpam_removal") == 1
    assert all(line["metrics"]["L1"] < 0.03 for line in lines if line["method"] == "truth")
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert (
        "- ComfyUI: 0." in text and "- command: python3 dev.py bench run --count 1 --methods truth cpam_removal" in text
    )
    assert (tmp_path / "results.html").stat().st_size > 5000
    runner.main([*asked[:-1], "http://127.0.0.1:1", "--out", str(tmp_path)])
    assert (tmp_path / "measured.jsonl").read_bytes() == measured
    assert "- ComfyUI: 0." in (tmp_path / "results.md").read_text(encoding="utf-8")


def pie_bench(folder):
    written.draw(folder / "data" / "annotation_images" / written.pie_entry()["image_path"], size=512)
    entries = {"000": written.pie_entry(mask=[100 * 512, 50 * 512]), "001": written.pie_entry(mask="three")}
    written.write(folder / "data" / "mapping_file.json", entries)


def tedbench(folder):
    written.draw(folder / "originals" / "bird.png")
    entries = [{"img_name": name, "target_text": "a green circle"} for name in ("bird.png", "gone.png")]
    written.write(folder / "input_list.json", entries)


def manifest(folder):
    Image.new("L", (96, 64), 255).save(written.draw(folder / "a.png").with_name("m.png"))
    entry = {"image": "a.png", "mask": "m.png", "target_prompt": "a green circle", "object_prompt": "circle"}
    flags = {"retain": False, "modify": True, "background": False}
    written.write(folder / "manifest.json", [entry | flags, entry])


def magicbrush(folder):
    told, _ = written.magicbrush(folder, {"139": 2})
    written.write(folder / "edit_sessions.json", told | {"8": "nothing"})


def ti2i(folder):
    written.draw(folder / "data" / "flat.png")
    lines = "- {init_img: /x/flat.png, source_prompt: a cat, target_prompts: [a dog]}\n- {target_prompts: [a dog]}\n"
    (folder / "wild-ti2i-real.yaml").write_text(lines)


@pytest.mark.parametrize("write, drawn, not_for", [
    # Samples that "autoencoder", which is for all, and the swap, which needs the source's caption, draw.
    (pie_bench, {"000": 2}, ""),
    (tedbench, {"bird.png-a_green_circle": 1}, "no caption of the source"),
    (manifest, {"0": 1}, "no caption of the source"),
    (magicbrush, {"139_1": 2, "139_inde_2": 2, "139_iter_1": 2, "139_iter_2": 2}, ""),
    (ti2i, {"wild-ti2i-real-00-0": 2}, ""),
])  # fmt: skip
def test_the_public_formats_are_drawn_and_measured(server, tmp_path, write, drawn, not_for):
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    write(folder)
    data = f"{write.__name__.replace('_', '-')}:{folder}"
    asked = ["--data", data, "--methods", "autoencoder", "p2p_ddim", "--steps", "2", "--servers", server.url]
    runner.main([*asked, "--out", str(out)])
    lines = [json.loads(line) for line in (out / "measured.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(line["sample"] for line in lines) == drawn
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text.count("it is left out") == 1
    assert "Pictures that failed" not in text
    assert ("Not applicable" in text) == bool(not_for) and not_for in text
