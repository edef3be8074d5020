"""Attune: edit pictures with Stable Diffusion by steering its attention."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES

WEB_DIRECTORY = "./web"


class Attune(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return Attune()
