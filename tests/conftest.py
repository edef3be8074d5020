"""Makes the checkout importable as `attune`, whatever its folder is called, without running its `__init__.py`."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# `python -m pytest` put the checkout on the path, where our nodes/ would shadow ComfyUI's nodes.py.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# ComfyUI loads a pack by location in the same way.
spec = importlib.util.spec_from_file_location("attune", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules["attune"] = importlib.util.module_from_spec(spec)

from attune.tests import host  # noqa: E402 - there is no such package before this


def pytest_configure() -> None:
    host.stop_cleanly_on_signals()


@pytest.fixture(scope="session")
def server():
    """The current ComfyUI with this checkout as its only custom node; one for the whole run."""
    with host.Server(host.Host.current()) as running:
        yield running
