"""What `comfy node pack` packs: the files that git tracks, without those that .comfyignore names."""

import subprocess

import pytest

from .host import ROOT


def tracked(*options: str) -> set[str]:
    """Paths in the repository, as git lists them with these options."""
    if not (ROOT / ".git").exists():
        pytest.skip("the archive is made of what git tracks, and this is no git checkout")
    out = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, check=True).stdout
    return set(out.decode().split("\0")) - {""}


def packed() -> set[str]:
    return tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")
