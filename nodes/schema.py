"""What the node files share: the pack's own socket types and the search names that only newer hosts take."""

from comfy_api.latest import io

Trajectory = io.Custom("ATTUNE_TRAJECTORY")
Maps = io.Custom("ATTUNE_MAPS")  # maps.WordMaps
Turns = io.Custom("ATTUNE_TURNS")  # turns.Turns
Refinement = io.Custom("ATTUNE_REFINEMENT")  # refinement.Refinement


def searchable(schema, *names):
    """The schema with further names it is found under. ComfyUI 0.3.75 refuses the keyword but carries the attribute."""
    schema.search_aliases = list(names)
    return schema


def folded(schema, *inputs):
    """The schema with these widgets put away until the user asks for them, by a key that the host's canvas knows."""
    for widget in schema.inputs:
        if widget.id in inputs:
            widget.extra_dict = {**(widget.extra_dict or {}), "advanced": True}
    return schema


def rgb(image):
    """An IMAGE (B, H, W, 1 to 4) as red, green and blue (B, H, W, 3): gray becomes all three, and an alpha channel, the
    second or the fourth, is dropped as VAE Encode drops it."""
    return image[..., :3] if image.shape[-1] >= 3 else image[..., :1].expand(*image.shape[:-1], 3)


def node_id(cls):
    """The running node's number in its graph, or None outside one."""
    return getattr(cls.hidden, "unique_id", None)


def title(cls):
    """The node's name as users read it."""
    return cls.define_schema().display_name


# Nodes that hand on the text of these inputs as it is; where there are several, of all of them if they say the same.
TEXTS = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("text_g", "text_l"),
    "CLIPTextEncodeSDXLRefiner": ("text",),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
}


def caption(cls, name):
    """The text behind a node's conditioning input, where the graph says it plainly; None elsewhere, such as behind a
    node that works on the text, since a wrong caption is worse than none.

    It is only ever written into a trajectory's header, for people to read.
    """
    prompt = getattr(cls.hidden, "prompt", None) or {}
    value = prompt.get(node_id(cls), {}).get("inputs", {}).get(name)
    return _text(prompt, value) if isinstance(value, list) else None


def _text(prompt, value):
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    node = prompt.get(value[0], {})
    said = {_text(prompt, node["inputs"].get(name)) for name in TEXTS.get(node.get("class_type"), ())}
    return said.pop() if len(said) == 1 else None
