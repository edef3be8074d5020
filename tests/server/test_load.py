"""The real server loads the whole pack, on every ComfyUI at hand."""

import ast

import pytest

from attune.tests import host


def node_ids_in_source() -> set[str]:
    """Read from the source, because ComfyUI drops a node that it cannot register with no more than a warning."""
    return {
        keyword.value.value
        for file in (host.ROOT / "nodes").rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
    }


@pytest.mark.hosts
def test_every_node_is_registered(every_server):
    info = every_server.object_info()
    log = every_server.log_tail()
    ours = {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.attune"}
    assert ours, f"The pack did not load. {log}"
    assert set(ours) == node_ids_in_source(), log
    assert all(node["display_name"] and node["category"].startswith("Attune/") for node in ours.values())
