"""Finding a node by typing, and which of its widgets are for experts."""


def test_a_node_is_found_and_added_by_its_name(comfy):
    """By its name alone: the host's frontend 1.32 does not look at the other words that a node may be sought by."""
    page = comfy.page
    comfy.command("Comfy.NewBlankWorkflow")
    page.mouse.dblclick(*comfy.middle)
    page.locator(".comfy-vue-node-search-box input").wait_for()
    page.keyboard.type("prompt swap")
    found = page.locator(".comfy-vue-node-search-box .option-container")
    found.filter(has_text="Attune Prompt Swap").wait_for()
    comfy.shot("search")
    assert "Attune Prompt Swap" in found.first.inner_text()
    page.keyboard.press("Enter")
    page.wait_for_function("app.graph.nodes.length === 1")
    assert page.evaluate("app.graph.nodes[0].type") == "AttunePromptSwap"
    page.locator(".comfy-vue-node-search-box").wait_for(state="hidden")
    assert not comfy.complaints()


def test_widgets_for_experts_are_marked_so(comfy):
    """The host's frontend 1.32 knows which these are, and does not fold them away yet."""
    marked = comfy.page.evaluate("""() => Object.fromEntries(
        Object.keys(LiteGraph.registered_node_types).filter(id => id.startsWith("Attune")).map(id => {
            const node = LiteGraph.createNode(id);
            node.onRemoved?.();
            return [id, (node.widgets ?? []).filter(w => w.options.advanced).map(w => w.name).sort()];
        }))""")
    info = comfy.server.object_info()
    for node, widgets in marked.items():
        slots = {**info[node]["input"].get("required", {}), **info[node]["input"].get("optional", {})}
        assert widgets == sorted(name for name, (_, *rest) in slots.items() if rest and rest[0].get("advanced"))
    assert any(marked.values())
