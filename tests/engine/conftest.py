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


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes so."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def server_progress(monkeypatch):
    """An older ComfyUI looks for Cancel in its server's progress bar only, so there is one here."""
    import comfy.model_management
    import comfy.utils

    look = comfy.model_management.throw_exception_if_processing_interrupted
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: look())


@pytest.fixture(scope="module")
def bench():
    import torch

    from .bench import Bench

    with torch.inference_mode():
        return Bench()
