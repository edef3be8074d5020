"""Speed for memory: what edits read of their source is kept, and read again by the next edit."""

import functools
import logging

from comfy_api.latest import io

from ..attention_patches import host
from ..inversion import host as runs
from . import schema

log = logging.getLogger("attune")


class AttuneFeatureCache(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        node = io.Schema(
            node_id="AttuneFeatureCache",
            display_name="Attune Feature Cache",
            category="Attune/edit",
            description=(
                "Keeps in RAM what Attune's edits read of a source picture, so that the next edit of the same picture "
                "takes about as long as plain sampling. Put it between the loader (and its LoRAs) and the edit node; "
                "without it nothing is kept."
            ),
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL from before the edit node, with LoRAs and the like already on it."
                ),
                io.Int.Input(
                    "limit_mb",
                    default=4096,
                    min=1,
                    max=1 << 20,
                    tooltip=(
                        "The most RAM that is used, in MB. 50 steps of an SD 1.5 edit at 512x512 take 1200 to 3300; "
                        "what does not fit is run again, which costs time and changes no picture."
                    ),
                ),
            ],
            outputs=[io.Model.Output("caching_model", display_name="model", tooltip="For an Attune edit node.")],
            hidden=[io.Hidden.unique_id],
        )
        return schema.searchable(node, "keep source features", "cache attention", "speed up", "reuse", "faster")

    @classmethod
    def execute(cls, model, limit_mb):
        return io.NodeOutput(host.keep_features(model, limit_mb * 10**6, functools.partial(tell, schema.node_id(cls))))


def tell(node_id, text):
    log.info("Attune Feature Cache: %s", text)
    runs.say(node_id, text)


NODES = [AttuneFeatureCache]
