"""The Python in docs/ runs, on caches of both backends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def feats(request, tmp_path_factory, tiny_cache, ris) -> Path:
    """A directory in which `feats` is a cache of the backend."""
    directory = tmp_path_factory.mktemp(request.param)
    result = ris("cache", "convert", tiny_cache, directory / "feats", "--store", request.param)
    assert result.exit_code == 0, result.output
    return directory


@pytest.mark.parametrize("name", ["features.md", "cache-format.md"])
def test_the_examples_run(name: str, feats: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text("utf-8"), re.M | re.S)
    assert blocks
    program = "\n".join(blocks) + "\nimport sys; sys.exit('torch' in sys.modules)\n"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=feats, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_reading_without_ris_gives_what_ris_gives(feats: Path) -> None:
    """The last section of the specification, compared with the reader."""
    text = (ROOT / "docs" / "cache-format.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    program = block + (
        "\nassert 'ris_cache' not in __import__('sys').modules\n"
        "from ris_cache import FeatureCache\n"
        "assert (FeatureCache.open(root).read([image['image_id']]).sam[0] == sam).all()\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=feats, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
