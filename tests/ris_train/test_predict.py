"""Prediction: a mask in the image's own frame, a category by clear rules, and no foreign encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import CheckpointError, ConfigError, DataError, FingerprintMismatchError
from ris_cache.store.cache import FeatureCache
from ris_train.checkpoint import save_checkpoint
from ris_train.frames import to_original_frame
from ris_train.model.bert import bert_from_dict
from ris_train.model.segmenter import ModelInputs, RisModel
from ris_train.predict import (
    OVERLAY_COLOUR,
    Prediction,
    Predictor,
    predict,
    require_same_weights,
    save_prediction,
)
from ris_train.run import RunDirectory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def predictor(tiny_runs: Path) -> Predictor:
    """The trained run, whose model reads the sentence alone."""
    return Predictor.load(RunDirectory(tiny_runs / "first"), sam_weights=None, clip_weights=None, device=CPU)


@pytest.fixture(scope="module")
def category_predictor(predictor: Predictor) -> Predictor:
    """An untrained model of the same sizes that reads a category."""
    config = predictor.metadata.config
    reading = config.model_copy(
        update={"model": config.model.model_copy(update={"sparse_prompt": "category"})}
    )
    torch.manual_seed(0)
    model = RisModel(
        reading.model, predictor.metadata.encoder_spec, bert_from_dict(predictor.metadata.bert)
    ).eval()
    return Predictor(
        model=model,
        metadata=predictor.metadata.model_copy(update={"config": reading}),
        tokenizer=predictor.tokenizer,
        encoders=predictor.encoders,
    )


@pytest.fixture(scope="module")
def image_path(drawn_data: Path) -> Path:
    """One drawn image."""
    return sorted((drawn_data / "images" / "train2014").iterdir())[0]


@pytest.mark.parametrize("size", [(33, 70), (90, 41)], ids=["landscape", "portrait"])
def test_the_mask_lies_in_the_original_frame(
    predictor: Predictor, tmp_path: Path, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = tmp_path / "noise.png"
    Image.fromarray(pixels).save(path)
    prediction = predict(path, "the red circle", predictor)
    assert prediction.mask.shape == size
    assert prediction.mask.dtype == np.bool_
    assert np.array_equal(prediction.image, pixels)
    assert (prediction.category, prediction.category_source) == (None, "none")


def test_a_live_prediction_is_what_the_cached_features_give(
    predictor: Predictor, tiny_cache: Path, drawn_data: Path
) -> None:
    """The cache rounds to float16, which may move a pixel at an outline."""
    cache = FeatureCache.open(tiny_cache)
    cached = cache.images[int(cache.image_ids[0])]
    path = drawn_data / "images" / "train2014" / cached.file_name
    prediction = predict(path, "the blue square", predictor)
    features = cache.read([cached.image_id])
    token_ids, text_mask = predictor.tokenizer.encode(["the blue square"])
    inputs = ModelInputs(
        image_embeddings=torch.from_numpy(features.sam).float(),
        clip_features=torch.from_numpy(features.clip).float(),
        token_ids=token_ids,
        text_mask=text_mask,
        category_embeddings=None,
    )
    with torch.no_grad():
        logits = predictor.model(inputs, with_dfam=False).mask_logits[0]
    expected = to_original_frame(logits, (cached.height, cached.width)).numpy()
    assert 0.01 < expected.mean() < 0.99
    assert (prediction.mask != expected).mean() < 0.01


def test_the_expression_decides(category_predictor: Predictor, image_path: Path) -> None:
    """Other words, another mask: the text reaches the model."""
    first, second = (
        predict(image_path, text, category_predictor, category="star").mask
        for text in ("the red circle", "big blue square at the left")
    )
    again = predict(image_path, "the red circle", category_predictor, category="star").mask
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_a_blank_expression_is_refused(predictor: Predictor, image_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="The expression is empty"):
        predict(image_path, text, predictor)


def test_an_image_that_is_none_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "words.jpg"
    path.write_text("not an image")
    with pytest.raises(DataError, match=r"words\.jpg"):
        predict(path, "the circle", predictor)


def test_a_category_that_is_named_is_the_one_given(category_predictor: Predictor, image_path: Path) -> None:
    seen: list[ModelInputs] = []
    hook = category_predictor.model.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0])
    )
    prediction = predict(image_path, "the circle", category_predictor, category="star")
    hook.remove()
    assert (prediction.category, prediction.category_source) == ("star", "named")
    embedding = seen[0].category_embeddings
    assert embedding is not None
    expected = category_predictor.encoders.category_embeddings(["star"])
    assert torch.allclose(embedding, expected, atol=1e-6)


def test_without_a_name_clip_predicts_the_nearest_category(
    category_predictor: Predictor, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is embedded beside the fifth category, so that is the nearest."""
    names = category_predictor.metadata.categories.names
    embeddings = category_predictor.encoders.category_embeddings(names)
    monkeypatch.setattr(FrozenEncoders, "encode_texts", lambda self, texts: embeddings[4:5] * 0.9)
    prediction = predict(image_path, "whatever", category_predictor)
    assert (prediction.category, prediction.category_source) == (names[4], "predicted")


def test_an_unknown_category_lists_those_the_model_knows(
    category_predictor: Predictor, image_path: Path
) -> None:
    with pytest.raises(ConfigError, match="knows no category 'dog'") as caught:
        predict(image_path, "the dog", category_predictor, category="dog")
    for name in category_predictor.metadata.categories.names:
        assert name in str(caught.value)


def test_a_category_for_a_model_that_reads_none_is_refused(predictor: Predictor, image_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave --category out"):
        predict(image_path, "the star", predictor, category="star")


def test_the_overlay_tints_the_mask_halfway_and_nothing_else() -> None:
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    image[0, 1] = (200, 100, 0)
    image[1, 2] = (10, 20, 30)
    mask = np.zeros((2, 3), dtype=bool)
    mask[0, 1] = mask[1, 0] = True
    overlay = Prediction(image=image, mask=mask, category=None, category_source="none").overlay()
    assert OVERLAY_COLOUR == (255, 64, 64)
    # Half of (200, 100, 0) and half of (255, 64, 64); 227.5 and 127.5 round to the even number.
    expected = image.copy()
    expected[0, 1] = (228, 82, 32)
    expected[1, 0] = (128, 32, 32)
    assert overlay.dtype == np.uint8
    assert np.array_equal(overlay, expected)


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_outside_the_mask_the_overlay_is_the_image(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    mask = generator.random((7, 5)) < share
    before = image.copy()
    overlay = Prediction(image=image, mask=mask, category=None, category_source="none").overlay()
    assert np.array_equal(overlay[~mask], image[~mask])
    assert np.array_equal(image, before)
    tint = np.array(OVERLAY_COLOUR)
    distance = np.abs(overlay[mask].astype(int) - tint) * 2 - np.abs(image[mask].astype(int) - tint)
    assert np.abs(distance).max(initial=0) <= 1


def test_what_is_saved_is_the_mask_as_0_and_255_and_the_overlay(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    prediction = Prediction(
        image=generator.integers(0, 256, (6, 4, 3), dtype=np.uint8),
        mask=generator.random((6, 4)) < 0.5,
        category=None,
        category_source="none",
    )
    mask_path, overlay_path = save_prediction(prediction, tmp_path / "new" / "folder", "street")
    assert mask_path == tmp_path / "new" / "folder" / "street.mask.png"
    assert overlay_path.name == "street.overlay.png"
    assert np.array_equal(np.asarray(Image.open(mask_path)), np.where(prediction.mask, 255, 0))
    assert np.array_equal(np.asarray(Image.open(overlay_path)), prediction.overlay())


def test_a_predictor_uses_the_weights_and_the_tokenizer_of_its_run(predictor: Predictor) -> None:
    require_same_weights(predictor.metadata, predictor.encoders.weights)
    assert {role: record.label for role, record in predictor.encoders.weights.items()} == {
        role: predictor.metadata.weight_labels[role] for role in ("sam", "clip")
    }
    assert predictor.tokenizer.max_tokens == predictor.metadata.config.model.max_tokens
    assert not predictor.model.training


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
    predictor: Predictor, role: str, record: WeightsRecord
) -> None:
    weights = {**predictor.encoders.weights, role: record}
    with pytest.raises(FingerprintMismatchError) as caught:
        require_same_weights(predictor.metadata, weights)
    message = str(caught.value)
    assert f"features of {role.upper()} random(seed=0)" in message
    assert record.label in message
    assert f"--{role}-weights" in message
    assert caught.value.exit_code == 5


def test_a_run_trained_on_a_file_refuses_another_file(predictor: Predictor, tmp_path: Path) -> None:
    """The checkpoint says SAM came from a file; the encoders that load say another one."""
    run = RunDirectory(tmp_path / "run")
    file_record = {"kind": "file", "sha256": "ab" * 32, "seed": None}
    metadata = predictor.metadata.model_copy(
        update={
            "weights": {**predictor.metadata.weights, "sam": file_record},
            "weight_labels": {**predictor.metadata.weight_labels, "sam": "theirs.pth sha256:abababab"},
        }
    )
    save_checkpoint(run.checkpoint_path("best"), predictor.model, metadata)
    path = tmp_path / "other.pth"
    torch.save(predictor.encoders.sam.as_module().state_dict(), path)
    with pytest.raises(FingerprintMismatchError, match=r"theirs\.pth .* these weights are other\.pth"):
        Predictor.load(run, sam_weights=str(path), clip_weights=None, device=CPU)


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        Predictor.load(RunDirectory(tmp_path), sam_weights=None, clip_weights=None, device=CPU)
