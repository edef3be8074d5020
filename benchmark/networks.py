"""The trained networks that metrics look with, from the user's disk: nothing here ever asks the network.

A network is looked for in a folder of the user's (FOLDER/clip-vit-large-patch14 and so on, as ``save_pretrained`` lays
it out; SqueezeNet's weights under torchvision's file name, Inception's under torch-fidelity's), then in the cache
of the Hugging Face hub or of torch.
"""

import functools
import importlib.util
import warnings
from pathlib import Path

import torch

CLIP_LARGE, CLIP_BASE = "openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32"
DINO_B8, DINO_S16 = "facebook/dino-vitb8", "facebook/dino-vits16"
SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"  # the one of FID's own code, as torch-fidelity has it
FILES = {SQUEEZENET: ("lpips", "torchvision"), INCEPTION: ("torch_fidelity",)}  # each with what reads it
WEIGHTS = "model.safetensors", "pytorch_model.bin"


class Missing(RuntimeError):
    """A network or a package that is not there, in one sentence."""


def need(*packages):
    """Raises :class:`Missing` where a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"The package {package} is not installed; install it to have this column.")


class Networks:
    """The networks of one folder (a Path or None) and of the user's caches, each loaded when it is first asked for."""

    def __init__(self, folder=None, device="cpu"):
        self.folder, self.device = Path(folder) if folder else None, device

    def find(self, name):
        """Where a network of the hub (owner/name) or one of FILES lies. Raises :class:`Missing`."""
        own = [] if self.folder is None else [self.folder / name.split("/")[-1]]
        if name in FILES:
            need(*FILES[name])
            cached = Path(torch.hub.get_dir()) / "checkpoints" / name
            return _first([p for p in (*own, cached) if p.is_file()], name, [*own, "torch's cache"])
        need("transformers", "torchvision")
        from huggingface_hub import try_to_load_from_cache

        # The cache answers with a path, None, or a mark that the file is known not to exist.
        cached = [Path(p).parent for p in (try_to_load_from_cache(name, w) for w in WEIGHTS) if isinstance(p, str)]
        found = [p for p in own if any((p / weights).is_file() for weights in WEIGHTS)] + cached
        return _first(found, name, [*own, "the hub's cache"])

    @functools.cached_property
    def squeezenet(self):
        """LPIPS's network (Zhang et al. 2018, version 0.1) on SqueezeNet, for pictures in -1..1; its ``spatial`` says
        whether it gives a map or a mean. The linear layers are the package's."""
        import lpips

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, about how lpips calls it
            network = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)
        state = torch.load(self.find(SQUEEZENET), map_location="cpu", weights_only=True)
        # The layers keep torchvision's numbers, in slices: features.3.x is slice2.3.x.
        mine = {key: state["features." + key.split(".", 1)[1]] for key in network.net.state_dict()}
        network.net.load_state_dict(mine)
        return network.to(self.device).eval()

    @functools.cached_property
    def inception(self):
        """The Inception network that FID is defined with: uint8 pictures (N, 3, H, W) to features (N, 2048) and logits
        (N, 1008)."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        wanted, where = ["2048", "logits_unbiased"], str(self.find(INCEPTION))
        network = FeatureExtractorInceptionV3("inception-v3-compat", wanted, feature_extractor_weights_path=where)
        return network.to(self.device).eval()

    @functools.cache  # noqa: B019 - lives as long as the run, which has one of these
    def clip(self, name):
        """A CLIP model and its processor."""
        from transformers import CLIPModel, CLIPProcessor

        where = self.find(name)
        model = CLIPModel.from_pretrained(where, local_files_only=True)
        return model.to(self.device).eval(), CLIPProcessor.from_pretrained(where, local_files_only=True)

    @functools.cache  # noqa: B019 - as above
    def dino(self, name):
        """A DINO vision transformer (Caron et al. 2021)."""
        from transformers import ViTModel

        model = ViTModel.from_pretrained(self.find(name), local_files_only=True, add_pooling_layer=False)
        return model.to(self.device).eval()


def _first(found, name, places):
    if not found:
        looked = " and in ".join(str(place) for place in places)
        raise Missing(f"{name} is not on this machine (looked for in {looked}); get it there to have this column.")
    return found[0]
