"""The nodes are those that people's workflows were saved with, on every ComfyUI at hand."""

import pytest

from attune.tests import schemas


@pytest.mark.hosts
def test_nothing_that_workflows_rely_on_has_changed(every_server):
    changed = schemas.changes(schemas.load(), schemas.described(schemas.of_pack(every_server.object_info())))
    assert not changed, "\n".join([*changed, "If that is meant, `python3 dev.py schemas` writes it down."])
