"""ComfyUI's interface in a browser, as far as the tests of this room use it."""

import re
from pathlib import Path

from playwright.sync_api import Page

from attune.tests import host

MODULE = "attune"  # the pack's folder on the server, under which the interface lists its templates

READY = "window.app?.extensionManager?.spinner === false && !!app.canvas?.graph"
LOAD = """async ([graph, name]) => {
    await app.loadGraphData(graph, true, true, name, {openSource: "template"});
}"""
FETCH = "async address => await (await fetch(address)).json()"
# A toast or a dialog comes with the next frame, the fitted view with the one after the first drawing.
FRAMES = """() => new Promise(done =>
    requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done))))"""
TOASTS = ".p-toast-message-error:visible, .p-toast-message-warn:visible"
RED = """() => {
    const wrong = app.graph.nodes.filter(
        n => n.has_errors || n.inputs?.some(i => i.hasErrors) || app.lastNodeErrors?.[n.id]);
    const failed = app.lastExecutionError;
    const drawn = [...document.querySelectorAll(".node-error, .border-node-stroke-error")];
    return [...wrong.map(n => `red node ${n.id} ${n.type}`), ...(failed ? [`${failed.node_type} failed`] : []),
            ...drawn.map(e => `red: ${e.closest("[data-node-id]")?.innerText ?? e.innerText}`)];
}"""
I18N = """Object.getOwnPropertySymbols(document.querySelector("#vue-app").__vue_app__._context.provides)
    .map(key => document.querySelector("#vue-app").__vue_app__._context.provides[key])
    .find(provided => provided?.global?.mergeLocaleMessage).global"""
WHERE = """([x, y]) => {
    const frame = app.canvas.canvas.getBoundingClientRect(), at = app.canvas.ds.convertOffsetToCanvas([x, y]);
    return [frame.x + at[0], frame.y + at[1]];
}"""


class Comfy:
    """One page with the interface, in one renderer."""

    def __init__(self, page: Page, server: host.Server, renderer: str, shots: Path):
        self.page, self.server, self.renderer, self.shots = page, server, renderer, shots
        self.errors: list[str] = []
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: self.errors.append(f"script: {error}"))
        page.on("console", lambda message: message.type == "error" and self.hear(message))
        page.goto(server.url, wait_until="commit")
        page.wait_for_function(READY)

    @property
    def vue(self) -> bool:
        return self.renderer == "vue"

    def hear(self, message) -> None:
        # The interface asks for files that may well be missing, and of the net, which is refused here.
        if "Failed to load resource" not in message.text:
            self.errors.append(f"console: {message.text}")

    def tidy(self) -> None:
        """Close what lies over the canvas, and forget what was complained about."""
        for dialog in self.page.locator(".p-dialog").all():
            self.page.mouse.click(2, self.middle[1])  # beside it
            dialog.wait_for(state="hidden")
        for button in self.page.locator(".side-bar-button-selected").all():
            button.click()
        self.page.evaluate("app.extensionManager.toast.removeAll()")
        self.errors.clear()

    def frames(self) -> None:
        self.page.evaluate(FRAMES)

    def shot(self, name: str) -> None:
        self.shots.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=self.shots / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{self.renderer}.png")

    # -- workflows ------------------------------------------------------------------------------------------------

    def template(self, name: str) -> dict:
        return self.page.evaluate(FETCH, f"/api/workflow_templates/{MODULE}/{name}.json")

    def load(self, graph: dict, name: str | None = None) -> None:
        """Open a workflow as the template browser does it, and wait until all of it is drawn."""
        self.page.evaluate(LOAD, [graph, name])
        self.drawn()

    def reload(self, graph: dict) -> None:
        """Open another version of the workflow in its own tab."""
        self.page.evaluate(
            "async graph => await app.loadGraphData(graph, true, true, app.extensionManager.workflow.activeWorkflow)",
            graph,
        )
        self.drawn()

    def find(self, kind: str) -> int:
        """The number of the first node of a class."""
        return self.page.evaluate("kind => app.graph.nodes.find(n => n.type === kind).id", kind)

    def drawn(self) -> None:
        if self.vue:
            self.page.wait_for_function(
                "document.querySelectorAll('.lg-node[data-node-id]').length === app.graph.nodes.length"
            )
        self.frames()

    def saved(self) -> dict:
        """The workflow as the interface would write it to a file."""
        return self.page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def prompt(self) -> dict:
        """The API form that the interface would send to the server."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def complaints(self) -> list[str]:
        """Everything wrong that a user would see, or find in the browser's console."""
        self.frames()
        shown = self.page.locator(f".p-dialog:visible, {TOASTS}").all_inner_texts()
        return [*shown, *self.page.evaluate(RED), *self.errors]

    # -- the mouse ------------------------------------------------------------------------------------------------

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)
        self.frames()

    @property
    def middle(self) -> tuple[float, float]:
        size = self.page.viewport_size
        return size["width"] / 2, size["height"] / 2

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a place of the graph is on the page."""
        x, y = self.page.evaluate(WHERE, [x, y])
        return x, y

    def select(self, number: int) -> None:
        """Bring a node to the middle and click on its title."""
        x, y = self.page.evaluate(
            """id => { const n = app.graph.getNodeById(id); app.canvas.deselectAll(); app.canvas.ds.scale = 1;
            app.canvas.centerOnNode(n); app.canvas.setDirty(true, true);
            return [n.pos[0] + n.size[0] / 2, n.pos[1] - 12]; }""",
            number,
        )
        self.frames()
        self.page.mouse.click(*self.at(x, y))

    def tooltip(self, number: int, widget: str) -> str:
        """What the interface says when the mouse rests on a widget of a node that is in view."""
        if self.vue:
            name = self.page.evaluate(
                "([id, name]) => app.graph.getNodeById(id).widgets.find(w => w.name === name).label", [number, widget]
            )
            self.page.locator(f"[data-node-id='{number}'] .lg-node-widget").get_by_text(name, exact=True).hover()
            return self.page.locator(".p-tooltip-text").inner_text()
        x, y = self.at(*self.page.evaluate(
            """([id, name]) => { const n = app.graph.getNodeById(id), w = n.widgets.find(w => w.name === name);
            return [n.pos[0] + n.size[0] / 2, n.pos[1] + w.y + 8]; }""",
            [number, widget],
        ))  # fmt: skip
        self.page.mouse.move(x, y - 1)
        self.page.mouse.move(x, y)
        return self.page.locator(".node-tooltip").inner_text()

    # -- settings -------------------------------------------------------------------------------------------------

    def speak(self, language: str) -> None:
        """Choose the language of the interface, read the nodes anew and open the workflow again, as the interface does.

        From 1.28 to 1.33 the host's frontend forgets what packs say in a language as soon as it loads its own texts in
        it (Comfy-Org/ComfyUI_frontend, pull request 7214); so they are handed to it once more.
        """
        self.page.evaluate("language => app.extensionManager.setting.set('Comfy.Locale', language)", language)
        self.page.wait_for_function(f"{I18N}.locale.value === '{language}'")
        self.page.evaluate(f"""async () => {{
            const texts = await (await fetch("/api/i18n")).json();
            for (const [language, words] of Object.entries(texts)) {I18N}.mergeLocaleMessage(language, words);
        }}""")
        self.command("Comfy.RefreshNodeDefinitions")
        self.reload(self.saved())
