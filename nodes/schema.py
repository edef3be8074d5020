"""What the node files share: the pack's own socket type and the search names that only newer hosts take."""

from comfy_api.latest import io

Trajectory = io.Custom("ATTUNE_TRAJECTORY")


def searchable(schema, *names):
    """The schema with further names it is found under. ComfyUI 0.3.75 refuses the keyword but carries the attribute."""
    schema.search_aliases = list(names)
    return schema


def check_choice(value, choices, what, node):
    """Raises ValueError for a value that is not on the list; the host does not check the lists of V3 nodes."""
    if value not in choices:
        raise ValueError(f'{what} is "{value}", but {node} takes one of: {", ".join(choices)}.')
