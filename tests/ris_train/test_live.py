"""Live segmentation: what the cached features give, whatever the batch, from the right encoders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import CheckpointError, ConfigError, FingerprintMismatchError, ShapeError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.fingerprint import cache_fingerprint, converted_fingerprint
from ris_train.arithmetic import feature_arithmetic
from ris_train.checkpoint import CheckpointMetadata
from ris_train.frames import to_original_frame
from ris_train.live import Segmenter, live_arithmetic, require_same_weights
from ris_train.model.bert import bert_from_dict
from ris_train.model.segmenter import ModelInputs, RisModel
from ris_train.pretrained import RISModel
from ris_train.run import RunDirectory

TEXTS = ["the red circle", "big blue square at the left", "the star", "a", "the third thing from the right"]


@pytest.fixture(scope="module")
def segmenter(tiny_runs: Path) -> Segmenter:
    """The trained run, whose model reads the sentence alone."""
    return Segmenter.load(RISModel.from_run(RunDirectory(tiny_runs / "first")))


def untrained(segmenter: Segmenter, **changes: Any) -> Segmenter:
    """An untrained model of the same sizes with other parts, on the same encoders."""
    metadata = segmenter.model.metadata
    config = metadata.config.model_copy(update={"model": metadata.config.model.model_copy(update=changes)})
    torch.manual_seed(0)
    network = RisModel(config.model, metadata.encoder_spec, bert_from_dict(metadata.bert)).eval()
    record = segmenter.model.record.model_copy(
        update={"checkpoint": metadata.model_copy(update={"config": config})}
    )
    model = RISModel(network=network, record=record, tokenizer=segmenter.model.tokenizer)
    return Segmenter(model, segmenter.encoders)


@pytest.fixture(scope="module")
def reads_category(segmenter: Segmenter) -> Segmenter:
    """A model that reads a category."""
    return untrained(segmenter, sparse_prompt="category")


@pytest.fixture(scope="module")
def image_path(drawn_data: Path) -> Path:
    """One drawn image."""
    return sorted((drawn_data / "images" / "train2014").iterdir())[0]


def from_cache(segmenter: Segmenter, cache: FeatureCache, image_id: int, text: str) -> torch.Tensor:
    """Logits of one expression from cached features, one at a time, by the model itself."""
    features = cache.read([image_id])
    token_ids, text_mask = segmenter.model.tokenizer.encode([text])
    inputs = ModelInputs(
        image_embeddings=torch.from_numpy(features.sam).float(),
        clip_features=torch.from_numpy(features.clip).float(),
        token_ids=token_ids,
        text_mask=text_mask,
        category_embeddings=None,
    )
    with torch.no_grad():
        return segmenter.model.network(inputs, with_dfam=False).mask_logits[0]


def test_live_logits_are_those_of_the_cached_features_but_for_float16(
    segmenter: Segmenter, tiny_cache: Path, drawn_data: Path
) -> None:
    """The cache holds float16: eleven significant bits, which may move a pixel at an outline."""
    cache = FeatureCache.open(tiny_cache)
    for image_id in cache.image_ids[:3].tolist():
        cached = cache.images[image_id]
        path = drawn_data / "images" / "train2014" / cached.file_name
        for text, found in zip(TEXTS, segmenter(path, TEXTS), strict=True):
            expected = from_cache(segmenter, cache, image_id, text)
            scale = expected.abs().max().item()
            assert np.abs(found.logits - expected.numpy()).max() < 2**-8 * scale
            mask = to_original_frame(expected, (cached.height, cached.width)).numpy()
            assert 0.01 < mask.mean() < 0.99
            assert (found.mask != mask).mean() < 0.01


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_the_batch_does_not_matter(segmenter: Segmenter, image_path: Path, batch_size: int) -> None:
    together = segmenter(image_path, TEXTS, batch_size=batch_size)
    assert len(together) == len(TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = segmenter(image_path, text)
        assert np.allclose(found.logits, alone.logits, atol=1e-4)
        assert (found.mask != alone.mask).mean() < 1e-3


def test_the_image_is_encoded_once_for_all_its_expressions(
    segmenter: Segmenter, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encode = FrozenEncoders.encode

    def counted(self: FrozenEncoders, sam: torch.Tensor, clip: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(len(sam))
        return encode(self, sam, clip)

    monkeypatch.setattr(FrozenEncoders, "encode", counted)
    segmenter(image_path, TEXTS, batch_size=2)
    assert calls == [1]
    assert segmenter(image_path, []) == []
    assert calls == [1], "nothing was asked"


@pytest.mark.parametrize("size", [(33, 70), (90, 41)], ids=["landscape", "portrait"])
def test_the_mask_lies_in_the_original_frame_of_a_file_or_an_array(
    segmenter: Segmenter, tmp_path: Path, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    for image in (path, str(path), pixels):
        (found,) = segmenter(image, "the red circle")
        assert (found.mask.shape, found.mask.dtype) == (size, np.bool_)
        side = 4 * segmenter.encoders.spec.sam.grid
        assert (found.logits.shape, found.logits.dtype) == ((side, side), np.float32)
        expected = to_original_frame(torch.from_numpy(found.logits), size).numpy()
        assert np.array_equal(found.mask, expected)


def test_an_array_that_is_no_picture_is_refused(segmenter: Segmenter) -> None:
    with pytest.raises(ShapeError):
        segmenter(np.zeros((4, 4), dtype=np.uint8), "the circle")


def test_a_batch_of_nothing_is_refused(segmenter: Segmenter, image_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0"):
        segmenter(image_path, "the circle", batch_size=0)


@pytest.mark.parametrize(
    ("text", "message"), [(" ", "The expression is empty"), ("\udcff", r"no valid text: '\\udcff'")]
)
def test_an_expression_that_is_none_is_refused_in_the_words_of_the_call(
    segmenter: Segmenter, image_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        segmenter(image_path, ["the circle", text])
    assert "--text" not in str(caught.value)


def test_the_expression_decides(reads_category: Segmenter, image_path: Path) -> None:
    """Other words, another mask: the text reaches the model."""
    first, second = reads_category(image_path, TEXTS[:2], category="star")
    (again,) = reads_category(image_path, TEXTS[0], category="star")
    assert not np.array_equal(first.mask, second.mask)
    assert np.allclose(first.logits, again.logits, atol=1e-4)


def test_a_category_that_is_named_is_the_one_given(reads_category: Segmenter, image_path: Path) -> None:
    seen: list[ModelInputs] = []
    hook = reads_category.model.network.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    found = reads_category(image_path, TEXTS[:2], category="star")
    hook.remove()
    assert {(one.category, one.category_source) for one in found} == {("star", "named")}
    embeddings = seen[0].category_embeddings
    assert embeddings is not None
    expected = reads_category.encoders.category_embeddings(["star", "star"])
    assert torch.allclose(embeddings, expected, atol=1e-6)


def test_without_a_name_clip_predicts_the_nearest_category_of_each_expression(
    reads_category: Segmenter, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are embedded beside the fifth and the second category, so these are the nearest."""
    names = reads_category.model.metadata.categories.names
    embeddings = reads_category.encoders.category_embeddings(names)
    monkeypatch.setattr(FrozenEncoders, "encode_texts", lambda self, texts: embeddings[[4, 1]] * 0.9)
    found = reads_category(image_path, ["one", "other"])
    assert [(one.category, one.category_source) for one in found] == [
        (names[4], "predicted"),
        (names[1], "predicted"),
    ]


def test_an_unknown_category_lists_those_the_model_knows(reads_category: Segmenter, image_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows no category 'dog'") as caught:
        reads_category(image_path, "the dog", category="dog")
    for name in reads_category.model.metadata.categories.names:
        assert name in str(caught.value)


def test_a_category_for_a_model_that_reads_none_is_refused(segmenter: Segmenter, image_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave category 'star' out"):
        segmenter(image_path, "the star", category="star")


@pytest.mark.parametrize("says_no_target", [True, False])
def test_what_refers_to_nothing_has_an_empty_mask(
    segmenter: Segmenter, image_path: Path, says_no_target: bool
) -> None:
    """The head is made to say the one or the other; a model without one says neither."""
    assert segmenter(image_path, "the circle")[0].says_no_target is None
    judging = untrained(segmenter, no_target_head=True)
    head = judging.model.network.no_target
    assert head is not None
    with torch.no_grad():
        head.layers[2].weight.zero_()
        head.layers[2].bias.copy_(torch.tensor([0.0, 1.0] if says_no_target else [1.0, 0.0]))
    for found in judging(image_path, TEXTS):
        assert found.says_no_target is says_no_target
        assert found.mask.any() == (not says_no_target and bool((found.logits > 0).any()))
        assert found.logits.any(), "the logits are the model's own"


def computed_in(metadata: CheckpointMetadata, arithmetic: str) -> CheckpointMetadata:
    """The metadata, had the cache been computed in another arithmetic."""
    weights = {role: metadata.weights[role] for role in ("sam", "clip")}
    other = cache_fingerprint(metadata.encoder_spec, weights, arithmetic=arithmetic, dtype="float16")
    return with_fingerprint(metadata, other.digest)


def test_encoders_compute_as_the_cache_was_computed(segmenter: Segmenter) -> None:
    """The run's cache is float32; had it been bfloat16, so would prediction be."""
    assert segmenter.encoders.arithmetic == "float32"
    record = segmenter.model.record.model_copy(
        update={"checkpoint": computed_in(segmenter.model.metadata, "bfloat16")}
    )
    model = RISModel(network=segmenter.model.network, record=record, tokenizer=segmenter.model.tokenizer)
    assert Segmenter.load(model).encoders.arithmetic == "bfloat16"
    assert Segmenter.load(model, arithmetic="float32").encoders.arithmetic == "float32"


@pytest.mark.parametrize(
    ("recorded", "device", "expected"),
    [
        ("float32", "cuda", "float32"),
        ("bfloat16", "cuda", "bfloat16"),
        ("float16", "cuda", "float16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float16", "cpu", "float32"),
    ],
)
def test_the_device_does_not_choose_the_arithmetic_but_for_float16_on_a_cpu(
    segmenter: Segmenter, recorded: str, device: str, expected: str
) -> None:
    metadata = computed_in(segmenter.model.metadata, recorded)
    assert live_arithmetic(metadata, torch.device(device)) == expected


def test_an_arithmetic_that_is_not_known_is_left_to_the_device(segmenter: Segmenter) -> None:
    unknown = with_fingerprint(segmenter.model.metadata, "0" * 64)
    assert live_arithmetic(unknown, torch.device("cuda")) == "auto"


@pytest.mark.parametrize("arithmetic", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "dtypes", [["float16"], ["float32"], ["float16", "int8"], ["int8", "float32", "bfloat16"]]
)
def test_the_arithmetic_of_any_cache_and_its_conversions_is_found(
    segmenter: Segmenter, arithmetic: str, dtypes: list[str]
) -> None:
    metadata = segmenter.model.metadata
    weights = {role: metadata.weights[role] for role in ("sam", "clip")}
    fingerprint = cache_fingerprint(metadata.encoder_spec, weights, arithmetic=arithmetic, dtype=dtypes[0])
    for dtype in dtypes[1:]:
        fingerprint = converted_fingerprint(fingerprint, dtype)
    assert feature_arithmetic(with_fingerprint(metadata, fingerprint.digest)) == arithmetic


def test_a_fingerprint_that_nothing_gives_has_no_arithmetic(segmenter: Segmenter) -> None:
    assert feature_arithmetic(with_fingerprint(segmenter.model.metadata, "0" * 64)) is None


def with_fingerprint(metadata: CheckpointMetadata, digest: str) -> CheckpointMetadata:
    return metadata.model_copy(update={"fingerprint": digest})


def test_a_segmenter_uses_the_weights_and_the_tokenizer_of_its_run(segmenter: Segmenter) -> None:
    metadata = segmenter.model.metadata
    require_same_weights(metadata, segmenter.encoders.weights)
    assert {role: record.label for role, record in segmenter.encoders.weights.items()} == {
        role: metadata.weight_labels[role] for role in ("sam", "clip")
    }
    assert segmenter.model.tokenizer.max_tokens == metadata.config.model.max_tokens
    assert not segmenter.model.network.training


@pytest.mark.parametrize("role", ["sam", "clip"])
@pytest.mark.parametrize(
    "record",
    [
        WeightsRecord(kind="random", sha256=None, seed=1, origin="random"),
        WeightsRecord(kind="file", sha256="ab" * 32, seed=None, origin="/weights/other.pth"),
    ],
    ids=["seed", "file"],
)
def test_encoders_of_other_weights_are_refused_by_name(
    segmenter: Segmenter, role: str, record: WeightsRecord
) -> None:
    weights = {**segmenter.encoders.weights, role: record}
    with pytest.raises(FingerprintMismatchError) as caught:
        require_same_weights(segmenter.model.metadata, weights)
    message = str(caught.value)
    assert f"features of {role.upper()} random(seed=0)" in message
    assert record.label in message
    assert f"--{role}-weights" in message
    assert caught.value.exit_code == 5


def test_a_model_trained_on_a_file_refuses_another_file(segmenter: Segmenter, tmp_path: Path) -> None:
    """The checkpoint says SAM came from a file; the encoders that load say another one."""
    metadata = segmenter.model.metadata
    theirs = metadata.model_copy(
        update={
            "weights": {**metadata.weights, "sam": {"kind": "file", "sha256": "ab" * 32, "seed": None}},
            "weight_labels": {**metadata.weight_labels, "sam": "theirs.pth sha256:abababab"},
        }
    )
    model = RISModel(
        network=segmenter.model.network,
        record=segmenter.model.record.model_copy(update={"checkpoint": theirs}),
        tokenizer=segmenter.model.tokenizer,
    )
    path = tmp_path / "other.pth"
    torch.save(segmenter.encoders.sam.as_module().state_dict(), path)
    with pytest.raises(FingerprintMismatchError, match=r"theirs\.pth .* these weights are other\.pth"):
        Segmenter.load(model, sam_weights=str(path))
    with pytest.raises(FingerprintMismatchError):
        Segmenter(model, segmenter.encoders)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        RISModel.from_run(RunDirectory(tmp_path))
