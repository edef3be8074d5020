"""One server and one browser for this room, and ComfyUI's own interface in it, once in each of its two renderers.

Screenshots are left in `.host/browser/` to be looked at; no test reads them.
"""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from attune.tests import host
from attune.tests.browser.page import Comfy
from attune.tests.server.conftest import started

SHOTS = host.ROOT / ".host" / "browser"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Nothing but the server is there, so what the interface asks of the net is refused on every machine alike.
OPTIONS = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-gpu"]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or the template browser opens by itself
    "Comfy.Locale": "en",  # or it is the system's
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Pointer.DoubleClickTime": 1000,  # for a machine that is busy
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # so that screenshots show the words
    "LiteGraph.Node.TooltipDelay": 50,
}


@pytest.fixture(scope="session")
def server():
    """The current ComfyUI, its base folder thrown away at the end."""
    with started(host.Host.current()) as running:
        yield running


@pytest.fixture(scope="session")
def browser():
    named = os.environ.get("ATTUNE_CHROMIUM")
    program = next(filter(None, map(shutil.which, [named] if named else PROGRAMS)), None)
    if not program:
        pytest.skip("There is no Chromium on the PATH; install one, or name its program in ATTUNE_CHROMIUM.")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session", params=["classic", "vue"])
def session(request, server, browser):
    """The interface in the canvas renderer and in the one that the host calls Nodes 2.0."""
    server.post("/settings", {**SETTINGS, "Comfy.VueNodes.Enabled": request.param == "vue"})
    with browser.new_context(viewport={"width": 1600, "height": 1000}) as context:
        yield Comfy(context.new_page(), server, request.param, SHOTS)


@pytest.fixture
def comfy(session):
    """The interface with nothing open over the canvas and no complaint from the test before."""
    session.tidy()
    return session
