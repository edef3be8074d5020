"""Opens ComfyUI's own modules (comfy, nodes, folder_paths ...) to the tests in this room."""

import sys

import pytest

from attune.tests import host

host.open_modules(host.Host.current())


@pytest.fixture(scope="session")
def pack():
    """The pack's package after its `__init__.py` has run, as ComfyUI sees it."""
    module = sys.modules["attune"]
    module.__spec__.loader.exec_module(module)
    return module
