"""Checkpoints: the model that comes back is the one that was kept, and no other file passes for one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ris_cache.encoders.spec import PAPER, TINY
from ris_cache.errors import CheckpointError, FingerprintMismatchError
from ris_train.checkpoint import (
    METADATA_KEY,
    CategoryNames,
    CheckpointMetadata,
    checkpoint_bytes,
    load_checkpoint,
    load_weights,
    read_metadata,
    require_same_cache,
    save_checkpoint,
    tensors_digest,
)
from ris_train.config import BertConfig, ModelConfig, RunConfig, TrainConfig
from ris_train.model.bert import random_bert
from ris_train.model.segmenter import ModelInputs, RisModel

VOCAB_SIZE = 30
CONFIG = RunConfig(
    recipe="tiny",
    model=ModelConfig(
        sparse_prompt="category",
        num_queries=5,
        num_heads=4,
        ffn_dim=32,
        pixel_decoder_layers=1,
        norm_groups=8,
        bert=BertConfig(weights=None, hidden_size=32, num_layers=1, num_heads=2, ffn_dim=32),
    ),
    train=TrainConfig(lr=3.3e-5, milestones=(0.25, 0.5)),
)


def build(*, num_queries: int = 5, seed: int = 0) -> RisModel:
    """A small model whose weights differ from seed to seed."""
    torch.manual_seed(seed)
    bert, _ = random_bert(CONFIG.model.bert, vocab_size=VOCAB_SIZE, seed=seed)
    return RisModel(CONFIG.model.model_copy(update={"num_queries": num_queries}), TINY, bert).eval()


def describe(model: RisModel, **changes: Any) -> CheckpointMetadata:
    values: dict[str, Any] = {
        "config": CONFIG,
        "encoders": TINY.as_dict(),
        "fingerprint": "3f9c01" * 10,
        "weights": {"sam": {"kind": "random", "sha256": None, "seed": 0}},
        "weight_labels": {"sam": "random(seed=0)"},
        "categories": CategoryNames(ids=(1, 90), names=("circle", "étoile"), prompt_template="a {}."),
        "bert": model.language.bert.config.to_diff_dict(),
        "step": 12,
        "val": {"oIoU": 0.1234567890123},
    }
    return CheckpointMetadata(**(values | changes))


@pytest.fixture(scope="module")
def model() -> RisModel:
    """One model for the whole file; tests must not change it."""
    return build().requires_grad_(False)


@pytest.fixture
def saved(model: RisModel, tmp_path: Path) -> Path:
    """A checkpoint of `model`."""
    path = tmp_path / "checkpoints" / "best.safetensors"
    save_checkpoint(path, model, describe(model))
    return path


@pytest.fixture
def rewrite_metadata(saved: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Change the metadata of `saved` as another program might, its tensors staying as they are."""

    def rewrite(edit: Callable[[dict[str, Any]], object]) -> None:
        with safe_open(saved, framework="pt") as file:
            fields = json.loads(file.metadata()[METADATA_KEY])
        edit(fields)
        save_file(load_file(saved), saved, metadata={METADATA_KEY: json.dumps(fields)})

    return rewrite


def test_the_model_that_comes_back_says_the_same_to_the_bit(model: RisModel, saved: Path) -> None:
    loaded, _ = load_checkpoint(saved, device=torch.device("cpu"))
    shapes = TINY.feature_shapes()
    torch.manual_seed(1)
    inputs = ModelInputs(
        image_embeddings=torch.randn(2, *shapes["sam"]),
        clip_features=torch.randn(2, *shapes["clip"]),
        token_ids=torch.randint(VOCAB_SIZE, (2, 4)),
        text_mask=torch.tensor([[True] * 4, [True, True, False, False]]),
        category_embeddings=torch.randn(2, *shapes["clip_pooled"]),
    )
    with torch.no_grad():
        expected, found = model(inputs), loaded(inputs)
    assert torch.equal(found.mask_logits, expected.mask_logits)
    for ours, theirs in zip(found.dfam, expected.dfam, strict=True):
        assert torch.equal(ours.mask_logits, theirs.mask_logits)
    assert not loaded.training


def test_the_metadata_comes_back_whole_and_names_the_encoders(model: RisModel, saved: Path) -> None:
    _, metadata = load_checkpoint(saved, device=torch.device("cpu"))
    assert metadata == read_metadata(saved)
    # Through JSON tuples become lists, also in the encoders' fields.
    assert json.loads(metadata.model_dump_json()) == json.loads(describe(model).model_dump_json())
    assert metadata.config == CONFIG
    assert metadata.val == {"oIoU": 0.1234567890123}
    assert metadata.encoder_spec == TINY


def test_a_score_over_nothing_does_not_make_the_checkpoint_unreadable(
    model: RisModel, tmp_path: Path
) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model, describe(model, val={"oIoU": math.nan, "mIoU": 0.0}))
    val = read_metadata(path).val
    assert math.isnan(val["oIoU"])
    assert val["mIoU"] == 0


def test_a_write_that_fails_leaves_the_old_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    other = build(seed=1)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved, other, describe(other, step=13))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_again_replaces_the_checkpoint(model: RisModel, saved: Path) -> None:
    save_checkpoint(saved, model, describe(model, step=13))
    assert read_metadata(saved).step == 13


def test_a_missing_checkpoint_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    with pytest.raises(CheckpointError, match="ris train") as caught:
        load_checkpoint(path, device=torch.device("cpu"))
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("keep", [0, 7, 1000, -1], ids=["empty", "length", "header", "last byte"])
def test_a_checkpoint_cut_short_is_called_damaged(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"is damaged \(.+\)\. Use another one") as caught:
        load_checkpoint(saved, device=torch.device("cpu"))
    assert str(saved) in str(caught.value)


def test_weights_that_are_not_those_written_are_found_and_the_file_is_named(
    model: RisModel, saved: Path, tmp_path: Path
) -> None:
    """One bit of one tensor, which leaves the file readable."""
    load_weights(build(seed=1), saved)
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    assert read_metadata(saved).step == 12
    with pytest.raises(CheckpointError, match="is damaged: its weights are not those that were") as caught:
        load_checkpoint(saved, device=torch.device("cpu"))
    assert str(saved) in str(caught.value)
    tensors = {"b": torch.zeros(2), "a": torch.tensor(1)}
    digests = {
        tensors_digest(tensors), tensors_digest(tensors | {"a": torch.tensor(2)}),
        tensors_digest(tensors | {"b": torch.zeros(2, 1)}), tensors_digest(tensors | {"c": torch.zeros(0)}),
    }  # fmt: skip
    assert len(digests) == 4, "values, shapes and names count"
    assert tensors_digest(dict(reversed(tensors.items()))) in digests, "their order does not"


def test_the_same_checkpoint_is_the_same_file(model: RisModel) -> None:
    """By whose digest an evaluation knows it."""
    assert len({checkpoint_bytes(model, describe(model)) for _ in range(8)}) == 1


def test_a_checkpoint_without_a_digest_is_taken_as_it_is(model: RisModel, tmp_path: Path) -> None:
    """As an earlier ris wrote them."""
    path = tmp_path / "best.safetensors"
    save_file(model.state_dict(), path, metadata={METADATA_KEY: describe(model).model_dump_json()})
    loaded, _ = load_checkpoint(path, device=torch.device("cpu"))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_torch_file_under_the_name_of_a_checkpoint_is_refused(model: RisModel, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    torch.save(model.state_dict(), path)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_metadata(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_another_program_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="is a safetensors file, but not a checkpoint of ris"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda fields: fields.update(format_version=2), "format_version"),
        (lambda fields: fields["config"]["model"].update(depth=3), r"config\.model\.depth"),
        (lambda fields: fields.pop("bert"), "bert"),
        (lambda fields: fields["encoders"].pop("sam"), "encoders: .*'sam'"),
        (lambda fields: fields["encoders"]["clip"].update(layer=7), "encoders: .*layer 7"),
    ],
    ids=["version", "key", "missing", "encoders", "layer"],
)
def test_metadata_of_another_version_says_which_field_is_not_understood(
    saved: Path,
    rewrite_metadata: Callable[[Callable[[dict[str, Any]], object]], None],
    edit: Callable[[dict[str, Any]], object],
    where: str,
) -> None:
    rewrite_metadata(edit)
    with pytest.raises(CheckpointError, match=rf"written by another version of ris: {where}"):
        load_checkpoint(saved, device=torch.device("cpu"))


def test_weights_of_another_model_are_named_and_counted(saved: Path) -> None:
    other = build(num_queries=6)
    with pytest.raises(CheckpointError, match="is of another model: dfam") as caught:
        load_weights(other, saved)
    assert "(5, 64), expected (6, 64)" in str(caught.value)


def test_missing_and_unknown_weights_are_named_and_the_model_is_left_alone(
    saved: Path, model: RisModel
) -> None:
    tensors = load_file(saved)
    names = [name for name in tensors if name.startswith("pwam.")][:4]
    for name in names:
        tensors[f"old.{name}"] = tensors.pop(name)
    save_file(tensors, saved, metadata={METADATA_KEY: describe(model).model_dump_json()})
    target = build(seed=1)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(target, saved)
    assert f"{names[0]} is missing" in str(caught.value)
    assert str(caught.value).endswith("and 5 more.")
    problems = caught.value.facts["problems"]
    assert isinstance(problems, list)
    assert set(problems) == {f"{name} is missing" for name in names} | {
        f"old.{name} is unknown" for name in names
    }
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_a_cache_of_the_same_fingerprint_is_accepted(model: RisModel) -> None:
    metadata = describe(model)
    require_same_cache(metadata, metadata.fingerprint, path=Path("best"), cache=Path("feats"))


def test_a_cache_of_another_fingerprint_is_refused_with_both_and_the_option(model: RisModel) -> None:
    metadata = describe(model, encoders=PAPER.as_dict())
    with pytest.raises(FingerprintMismatchError) as caught:
        require_same_cache(metadata, "a117d2" * 10, path=Path("runs/a/best"), cache=Path("feats"))
    for part in ("runs/a/best", "3f9c013f9c01", "feats", "a117d2a117d2", "--cache"):
        assert part in str(caught.value)
    assert caught.value.exit_code == 5
    assert caught.value.facts == {"expected": metadata.fingerprint, "found": "a117d2" * 10}
