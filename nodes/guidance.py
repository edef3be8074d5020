"""How the prompt leads: a MODEL whose guidance is bent."""

from functools import partial

from comfy_api.latest import io

from ..attention_patches import host
from ..attention_patches.proximal import RULES, proximal
from . import schema


class AttuneProximalGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneProximalGuidance",
            display_name="Attune Proximal Guidance",
            category="Attune/edit",
            description=(
                "Lets the prompt lead only where it asks for much, so that the rest of the picture stays as the "
                "negative draws it (ProxEdit). Made for Attune Negative-Prompt Inversion, whose negative is the source."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that draws; Attune's edits may be on it."),
                io.Float.Input(
                    "quantile",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.001,
                    tooltip=(
                        "The share of the values at which the prompt is not followed. Higher keeps more of the source; "
                        "lower gives the edit room. 0 switches this off; 0.5 to 0.8 is typical."
                    ),
                ),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default=RULES[0],
                    optional=True,
                    tooltip=(
                        "Soft takes the threshold off the rest as well, which softens the edit; hard leaves the rest "
                        "at full strength."
                    ),
                ),
            ],
            outputs=[
                # An output may not share its id with an input.
                io.Model.Output(
                    "bent", display_name="model", tooltip="Draws with it. The model that came in is not changed."
                )
            ],
        )
        schema.folded(node, "rule")
        return schema.searchable(node, "proximal guidance", "proxedit", "proxnpi", "prox", "guidance threshold")

    @classmethod
    def execute(cls, model, quantile, rule=RULES[0]):
        host.check_unet(model)
        if quantile == 0:
            return io.NodeOutput(model)
        return io.NodeOutput(host.bend_guidance(model, partial(proximal, share=quantile, rule=rule)))


NODES = [AttuneProximalGuidance]
