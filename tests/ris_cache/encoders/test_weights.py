"""Choosing, describing and reading weights."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ris_cache.encoders import clip as clip_module  # repairs torchvision before open_clip is patched below
from ris_cache.encoders.spec import PAPER, TINY
from ris_cache.encoders.weights import (
    FileWeights,
    RandomWeights,
    WeightsRecord,
    describe_weights,
    load_strictly,
    read_state_dict,
    resolve_clip_weights,
    resolve_sam_weights,
)
from ris_cache.errors import ConfigError, WeightsError

open_clip = clip_module.open_clip
SAM_FILE = "sam_vit_b_01ec64.pth"
CLIP_FILE = "ViT-L-14-336px.pt"


class RunsOnLoading:
    """A pickle of this creates the folder when it is loaded without protection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty weights folder that the environment points to."""
    monkeypatch.setenv("RIS_WEIGHTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)


def test_sam_weights_are_found_in_the_weights_folder(folder: Path) -> None:
    (folder / SAM_FILE).touch()
    assert resolve_sam_weights(None, PAPER.sam, random_seed=None) == FileWeights(folder / SAM_FILE)


def test_without_the_variable_the_folder_is_weights_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RIS_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / SAM_FILE).touch()
    assert resolve_sam_weights(None, PAPER.sam, random_seed=None) == FileWeights(Path("weights") / SAM_FILE)


def test_missing_sam_weights_say_what_to_download_and_where_to_put_it(folder: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        resolve_sam_weights(None, PAPER.sam, random_seed=None)
    message = str(caught.value)
    for part in (SAM_FILE, str(folder), "segment-anything", "$RIS_WEIGHTS", "--random-weights"):
        assert part in message
    assert caught.value.exit_code == 3


def test_a_path_is_taken_as_given(folder: Path) -> None:
    path = folder / "mine.pth"
    path.touch()
    assert resolve_sam_weights(str(path), TINY.sam, random_seed=None) == FileWeights(path)
    assert resolve_clip_weights(str(path), TINY.clip, random_seed=None) == FileWeights(path)


def test_a_folder_is_searched_for_the_published_file(folder: Path) -> None:
    (folder / SAM_FILE).touch()
    assert resolve_sam_weights(str(folder), PAPER.sam, random_seed=None) == FileWeights(folder / SAM_FILE)


@pytest.mark.parametrize("name", ["absent.pth", "nowhere/absent"])
def test_a_path_that_does_not_exist_is_an_error(folder: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="No weights file at"):
        resolve_sam_weights(str(folder / name), PAPER.sam, random_seed=None)
    with pytest.raises(WeightsError, match="No weights file at"):
        resolve_clip_weights(str(folder / name), PAPER.clip, random_seed=None)


def test_random_weights_are_used_only_when_asked_for(folder: Path) -> None:
    assert resolve_sam_weights(None, PAPER.sam, random_seed=7) == RandomWeights(7)
    assert resolve_clip_weights(None, TINY.clip, random_seed=0) == RandomWeights(0)
    for resolve, spec in ((resolve_sam_weights, TINY.sam), (resolve_clip_weights, TINY.clip)):
        with pytest.raises(WeightsError, match=r"'tiny' has no published weights.*--random-weights"):
            resolve(None, spec, random_seed=None)


def test_a_file_and_random_weights_together_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="choose one"):
        resolve_sam_weights("x.pth", PAPER.sam, random_seed=0)
    with pytest.raises(ConfigError, match="choose one"):
        resolve_clip_weights("openai", PAPER.clip, random_seed=0)


def test_a_clip_file_in_the_folder_is_preferred_to_a_download(folder: Path, offline: None) -> None:
    (folder / "open_clip_model.safetensors").touch()
    found = resolve_clip_weights(None, PAPER.clip, random_seed=None)
    assert found == FileWeights(folder / "open_clip_model.safetensors")
    (folder / CLIP_FILE).touch()
    assert resolve_clip_weights(None, PAPER.clip, random_seed=None) == FileWeights(folder / CLIP_FILE)


@pytest.mark.parametrize("argument", [None, "openai"])
def test_the_tag_is_resolved_to_the_file_that_people_also_fetch_by_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, argument: str | None
) -> None:
    asked = {}

    def download(config: dict[str, object], prefer_hf_hub: bool = True) -> str:
        asked.update(config, prefer_hf_hub=prefer_hf_hub)
        return str(folder / "downloads" / CLIP_FILE)

    monkeypatch.setattr(open_clip, "download_pretrained", download)
    found = resolve_clip_weights(argument, PAPER.clip, random_seed=None)
    assert found == FileWeights(folder / "downloads" / CLIP_FILE)
    assert str(asked["url"]).endswith(CLIP_FILE)
    assert asked["prefer_hf_hub"] is False


def test_a_failed_download_says_what_to_fetch_and_where_to_put_it(folder: Path, offline: None) -> None:
    with pytest.raises(WeightsError) as caught:
        resolve_clip_weights(None, PAPER.clip, random_seed=None)
    for part in (CLIP_FILE, "'openai'", "ViT-L-14-336-quickgelu", str(folder), "--random-weights"):
        assert part in str(caught.value)


def test_an_unknown_tag_lists_the_known_ones(folder: Path, offline: None) -> None:
    with pytest.raises(WeightsError, match=r"'laion9b' is neither a file nor .*known tags: openai"):
        resolve_clip_weights("laion9b", PAPER.clip, random_seed=None)


def test_a_file_record_carries_the_digest_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / SAM_FILE
    path.write_bytes(b"weights" * 100_000)
    record = describe_weights(FileWeights(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record == WeightsRecord(kind="file", sha256=digest, seed=None, origin=str(path))
    assert record.label == f"{SAM_FILE} sha256:{digest[:8]}"


def test_the_same_file_elsewhere_has_the_same_fingerprint(tmp_path: Path) -> None:
    paths = [tmp_path / "a.pth", tmp_path / "b.pth"]
    for path in paths:
        path.write_bytes(b"same")
    first, second = (describe_weights(FileWeights(path)) for path in paths)
    assert first != second
    assert first.as_dict() == second.as_dict()
    assert set(first.as_dict()) == {"kind", "sha256", "seed"}


def test_a_random_record_says_its_seed() -> None:
    record = describe_weights(RandomWeights(3))
    assert record.label == "random(seed=3)"
    assert record.as_dict() == {"kind": "random", "sha256": None, "seed": 3}


def test_describing_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth cannot be read: No such file"):
        describe_weights(FileWeights(tmp_path / "absent.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_named_tensors_are_read_back(tmp_path: Path, suffix: str) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1, dtype=torch.float16)}
    path = tmp_path / f"state{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    read = read_state_dict(path)
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0)


def test_what_training_programs_wrap_around_a_state_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    torch.save({"epoch": 3, "state_dict": {"module.a": torch.ones(2)}}, path)
    assert set(read_state_dict(path)) == {"a"}


@pytest.mark.parametrize("protocol_format", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, protocol_format: bool) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "was_run"
    evil = {"a": torch.zeros(1), "b": RunsOnLoading(trace)}
    torch.save(evil, path, _use_new_zipfile_serialization=protocol_format)
    with pytest.raises(WeightsError, match="Nothing in it was run") as caught:
        read_state_dict(path)
    assert not trace.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice to switch the protection off
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does run code where nothing stops it


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"PK\x03\x04junk", b"hello world\n", bytes(9999)]
)
def test_files_that_are_not_weights_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be read as plain tensors"):
        read_state_dict(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(WeightsError, match="cannot be read"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"a": torch.ones(1), "optimizer": {"lr": 1.0}}])
def test_a_file_of_anything_else_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "state.pth"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="named tensors"):
        read_state_dict(path)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_an_unknown_torchscript_archive_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    with pytest.raises(WeightsError, match="TorchScript archive"):
        read_state_dict(path)


def test_a_state_that_fits_is_converted_to_the_modules_dtype() -> None:
    module = nn.Linear(2, 2)
    load_strictly(module, {"weight": torch.eye(2).half(), "bias": torch.ones(2).half()}, path=Path("x.pth"))
    assert module.weight.dtype == torch.float32
    torch.testing.assert_close(module.weight.data, torch.eye(2))


def test_a_state_that_does_not_fit_names_the_first_few_and_changes_nothing() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    state = {"weight": torch.ones(3, 2), **{f"extra.{i}": torch.ones(1) for i in range(9)}}
    with pytest.raises(WeightsError) as caught:
        load_strictly(module, state, path=Path("x.pth"))
    message = str(caught.value)
    assert "x.pth" in message
    assert "1 missing: bias" in message
    assert "9 unexpected: extra.0, extra.1, extra.2, extra.3 and 5 more" in message
    assert "weight [3, 2] instead of [2, 2]" in message
    assert caught.value.facts["missing"] == ("bias",)
    torch.testing.assert_close(module.weight.data, before)


def test_naming_encoders_and_choosing_weights_does_not_import_torch() -> None:
    code = "import sys, ris_cache.encoders, ris_cache.encoders.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
