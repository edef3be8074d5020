"""Attune: edit pictures with Stable Diffusion by steering its attention."""

from comfy_api.latest import ComfyExtension

from .nodes import demo, edit, invert, view

WEB_DIRECTORY = "./web"


class Attune(ComfyExtension):
    async def get_node_list(self):
        return [*invert.NODES, *edit.NODES, *view.NODES, *demo.NODES]


async def comfy_entrypoint():
    return Attune()
