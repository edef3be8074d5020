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


def caption(cls, name):
    """The text behind a node's conditioning input, where the graph says it plainly; None elsewhere.

    It is only ever written into a trajectory's header, for people to read.
    """
    prompt = getattr(cls.hidden, "prompt", None) or {}
    text = prompt.get(node_id(cls), {}).get("inputs", {}).get(name)
    for _ in range(3):  # a text encoder, and what feeds its text
        if not isinstance(text, list):
            break
        inputs = prompt.get(text[0], {}).get("inputs", {})
        text = next((inputs[k] for k in ("text", "string", "value") if k in inputs), None)
    return text if isinstance(text, str) else None


def check_choice(value, choices, what, node):
    """Raises ValueError for a value that is not on the list; the host does not check the lists of V3 nodes."""
    if value not in choices:
        raise ValueError(f'{what} is "{value}", but {node} takes one of: {", ".join(choices)}.')
