"""Importing the pack into a ComfyUI that is already up takes no time, says nothing, and reaches for nothing."""

import json
import subprocess
import sys

import pytest

from attune.tests import host

# What ComfyUI and its own nodes have imported before custom nodes is in when the clock starts.
LOAD = """
import asyncio, contextlib, importlib.util, io, json, logging, sys, time, warnings
root, host, base = sys.argv[1:]
sys.argv[1:] = ["--cpu", "--base-directory", base]
sys.path.insert(0, host)
import comfy.options
comfy.options.enable_args_parsing()
import kornia, nodes

said, reached = io.StringIO(), []
handler = logging.StreamHandler(said)
logging.root.handlers[:] = [handler]
logging.root.setLevel(0)
warnings.simplefilter("always")
watched = ("socket.", "urllib.", "http.", "subprocess.", "os.system", "os.mkdir", "os.remove", "os.rename")

def look(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if (writes or event.startswith(watched)) and "__pycache__" not in str(arguments):
        reached.append([event, str(arguments)])

sys.addaudithook(look)
with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
    start = time.process_time()
    spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
    pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    seconds = time.process_time() - start
watched, said = ("nothing",), said.getvalue()
found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
print(json.dumps({"seconds": seconds, "said": said, "reached": reached, "nodes": len(found)}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    command = [sys.executable, "-c", LOAD, str(host.ROOT), str(host.Host.current().path), str(base)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=base)
    assert not run.returncode, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_it_takes_less_than_a_second(found):
    assert found["nodes"] > 30 and found["seconds"] < 1.0


def test_it_says_nothing(found):
    assert found["said"] == ""


def test_it_opens_no_connection_starts_nothing_and_writes_nothing(found):
    assert found["reached"] == []
