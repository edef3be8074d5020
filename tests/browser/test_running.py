"""Running by the interface's own buttons: progress on the nodes, pictures in them, and a run that is cancelled."""

import random
import time

from attune.tests.server import workflow

NULL_TEXT = "Attune - Null-text inversion"
# Which nodes showed that they were under way, and how far; on the canvas a node draws its own `progress`.
WATCH = """() => {
    window.shown = {};
    const look = () => {
        for (const node of app.graph.nodes)
            if (node.progress > 0 && node.progress < 1) (shown[node.type] ??= []).push(node.progress);
        requestAnimationFrame(look);
    };
    look();
}"""
WATCH_VUE = """() => {
    window.shown = {};
    const look = () => {
        for (const bar of document.querySelectorAll(".lg-node .bg-primary-500")) {
            const id = bar.closest("[data-node-id]").dataset.nodeId, part = parseFloat(bar.style.width) / 100;
            if (part > 0 && part < 1) (shown[app.graph.getNodeById(id).type] ??= []).push(part);
        }
        requestAnimationFrame(look);
    };
    look();
}"""
PICTURES = """() => app.graph.nodes.filter(n => n.type === "SaveImage")
    .every(n => n.imgs?.length && n.imgs.every(i => i.complete && i.naturalWidth > 0))"""
PICTURES_VUE = """() => app.graph.nodes.filter(n => n.type === "SaveImage").every(n => {
    const pictures = [...document.querySelectorAll(`[data-node-id="${n.id}"] img`)];
    return pictures.length && pictures.every(i => i.complete && i.naturalWidth > 0);
})"""


def short_demo(comfy) -> dict:
    """The demo's workflow in a few steps, of a scene that no run before has had: what is known already is not run."""
    graph = comfy.template(workflow.DEMO)
    (scene,) = (node for node in graph["nodes"] if node["type"] == "AttuneDemoScene")
    (inversion,) = (node for node in graph["nodes"] if node["type"] == "AttuneDDIMInversion")
    assert (scene["widgets_values"][1], inversion["widgets_values"][0]) == (workflow.SEED, 50)
    scene["widgets_values"][1], inversion["widgets_values"][0] = random.randrange(10, 10**6), 8
    return graph


def run(comfy) -> None:
    comfy.command("Comfy.Canvas.FitView")  # a picture is fetched when its node is in view
    comfy.page.get_by_test_id("queue-button").get_by_role("button").first.click()


def idle(comfy) -> bool:
    return comfy.server.get("/prompt")["exec_info"]["queue_remaining"] == 0


def test_the_demo_runs_by_the_run_button(comfy):
    comfy.load(short_demo(comfy), workflow.DEMO)
    comfy.page.evaluate(WATCH_VUE if comfy.vue else WATCH)
    run(comfy)
    comfy.page.wait_for_function("Object.keys(shown).length > 0")
    comfy.shot("running")
    comfy.page.wait_for_function(PICTURES_VUE if comfy.vue else PICTURES, timeout=300_000)
    assert {"AttuneDDIMInversion", "SamplerCustom"} <= comfy.page.evaluate("shown").keys()
    comfy.page.wait_for_function("app.graph.nodes.every(n => n.progress === undefined)")
    comfy.shot("ran")
    assert not comfy.complaints()
    assert idle(comfy)


def test_a_run_is_cancelled_by_the_button_and_another_one_works(comfy):
    comfy.load(comfy.template(NULL_TEXT), NULL_TEXT)
    run(comfy)
    comfy.page.wait_for_function(
        "app.graph.nodes.some(n => n.type === 'AttuneNullTextInversion' && n.progress > 0)", timeout=300_000
    )
    comfy.page.locator(".execution-actions button").first.click()
    cancelled = time.monotonic()
    while not idle(comfy):
        assert time.monotonic() - cancelled < 30, "the run goes on"
        comfy.frames()
    (entry,) = comfy.server.get("/history?max_items=1").values()
    assert "execution_interrupted" in {kind for kind, _ in entry["status"]["messages"]}
    assert not comfy.complaints()
    comfy.load(short_demo(comfy), workflow.DEMO)
    run(comfy)
    comfy.page.wait_for_function(PICTURES_VUE if comfy.vue else PICTURES, timeout=300_000)
    assert not comfy.complaints()
