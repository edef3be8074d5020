"""Servers for this room, with a small stand-in for the Stable Diffusion 1.5 file that the workflows load."""

import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest

from attune.tests import host


@contextlib.contextmanager
def started(release):
    with tempfile.TemporaryDirectory(prefix="attune-") as base:
        shutil.copytree(Path(__file__).parent / "standin", Path(base) / "custom_nodes" / "attune_standin")
        with host.Server(release, base=Path(base)) as running:
            running.upload_image("example.png", (release.path / "input" / "example.png").read_bytes())
            yield running


@pytest.fixture(scope="session")
def server():
    """The current ComfyUI; one for the whole run."""
    with started(host.Host.current()) as running:
        yield running


@pytest.fixture(scope="session", params=host.Host.every(), ids=str)
def every_server(request, server):
    """Each ComfyUI at hand; the first is the one that all tests share."""
    if request.param == host.Host.current():
        yield server
    else:
        with started(request.param) as running:
            yield running
