"""What dev.py answers to machines that cannot run it."""

import pytest

from attune import dev


@pytest.mark.parametrize("version", [(3, 8), (3, 9)])
def test_old_python_is_refused_in_one_sentence(version):
    with pytest.raises(dev.Stop, match=r"needs Python 3\.10 or newer; this is Python 3\.\d\.$"):
        dev.check_python(version)


def test_too_new_a_python_is_refused_only_for_the_pinned_packages():
    dev.check_python((3, 14))
    with pytest.raises(dev.Stop, match=r"3\.10 to 3\.13.*this is 3\.14"):
        dev.check_python((3, 14), newest=(3, 13))


def test_short_disk_is_refused_with_both_sizes():
    dev.check_disk(9e9, 9)
    with pytest.raises(dev.Stop, match=r"9 GB .* only 2\.5 GB"):
        dev.check_disk(2.5e9, 9)


def test_a_folder_without_comfyui_is_refused(tmp_path):
    with pytest.raises(dev.Stop, match="no ComfyUI there"):
        dev.own_comfyui(tmp_path)


def test_python_is_found_beside_an_own_comfyui(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    comfyui = tmp_path / "ComfyUI"
    for path in (comfyui / "main.py", comfyui / "comfy" / "x", dev.python_in(comfyui / ".venv")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert dev.own_comfyui(comfyui).python == str(dev.python_in(comfyui / ".venv"))
