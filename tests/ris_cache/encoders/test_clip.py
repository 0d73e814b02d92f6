"""CLIP's towers against open_clip's own configuration and forward."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ris_cache.encoders import clip as clip_module
from ris_cache.encoders.clip import (
    build_clip,
    category_embeddings,
    clip_config,
    encode_clip_images,
    encode_texts,
    load_clip,
)
from ris_cache.encoders.spec import PAPER, TINY
from ris_cache.encoders.weights import FileWeights, RandomWeights
from ris_cache.errors import ConfigError, ShapeError, WeightsError

open_clip = clip_module.open_clip


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def hooked_forward(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The library's own forward, with what its last residual block put out."""
    seen: list[torch.Tensor] = []
    handle = model.visual.transformer.resblocks[-1].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    pooled = model.encode_image(pixels)
    handle.remove()
    (tokens,) = seen
    return tokens[:, 1:], pooled


@pytest.fixture(scope="module")
def tiny() -> Any:
    model, _ = load_clip(TINY.clip, RandomWeights(0))
    return model.eval().requires_grad_(False)


@pytest.fixture
def pixels() -> torch.Tensor:
    side = TINY.clip.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_the_paper_preset_is_open_clips_own_configuration() -> None:
    ours, public = clip_config(PAPER.clip), open_clip.get_model_config(PAPER.clip.name)
    assert ours["vision_cfg"].pop("head_width") == open_clip.CLIPVisionCfg.head_width
    assert ours == public
    assert PAPER.clip.normalisation.mean == open_clip.OPENAI_DATASET_MEAN
    assert PAPER.clip.normalisation.std == open_clip.OPENAI_DATASET_STD


def test_the_paper_preset_has_the_published_parameter_count() -> None:
    with torch.device("meta"):
        model = build_clip(PAPER.clip)
    assert round(sum(parameter.numel() for parameter in model.visual.parameters()) / 1e6, 1) == 304.3


def test_the_openai_activation_is_used(tiny: Any) -> None:
    for tower in (tiny.visual.transformer, tiny.transformer):
        assert all(type(block.mlp.gelu).__name__ == "QuickGELU" for block in tower.resblocks)


def test_one_forward_gives_the_last_blocks_patches_and_the_image_embedding(pixels: torch.Tensor) -> None:
    # Three blocks, so that the last is neither the first nor the one after it.
    model, _ = load_clip(replace(TINY.clip, layers=3), RandomWeights(0))
    model.eval().requires_grad_(False)
    expected_tokens, expected_pooled = hooked_forward(model, pixels)
    calls: list[None] = []
    handle = model.visual.conv1.register_forward_hook(lambda *_: calls.append(None))
    tokens, pooled = encode_clip_images(model, pixels)
    handle.remove()
    assert len(calls) == 1
    assert tokens.shape == (2, *TINY.feature_shapes()["clip"])
    assert pooled.shape == (2, *TINY.feature_shapes()["clip_pooled"])
    assert relative_error(tokens, expected_tokens) < 1e-5
    assert relative_error(pooled, expected_pooled) < 1e-5


SIDE = TINY.clip.image_size


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, SIDE, SIDE), (1, 1, SIDE, SIDE)])
def test_pixels_of_another_shape_are_refused(tiny: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=rf"takes \[B, 3, {SIDE}, {SIDE}\]"):
        encode_clip_images(tiny, torch.zeros(shape))


@pytest.mark.slow
def test_at_full_image_size_and_width_the_features_equal_the_librarys_forward() -> None:
    # The text tower is not looked at, so one layer of it will do.
    model, _ = load_clip(replace(PAPER.clip, text_layers=1), RandomWeights(0))
    model.eval()
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, pooled = encode_clip_images(model, pixels)
        expected_tokens, expected_pooled = hooked_forward(model, pixels)
    assert tokens.shape == (1, *PAPER.feature_shapes()["clip"])
    assert relative_error(tokens, expected_tokens) < 1e-4
    assert relative_error(pooled, expected_pooled) < 1e-4


def test_text_embeddings_equal_the_librarys_and_have_unit_length(tiny: Any) -> None:
    texts = ["the lady with the blue shirt", "", "blue shirt"]
    expected = torch.nn.functional.normalize(tiny.encode_text(open_clip.tokenize(texts)), dim=-1)
    found = encode_texts(tiny, texts)
    assert found.shape == (3, TINY.clip.embed_dim)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_many_texts_equal_the_same_texts_in_pieces(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"object number {i}" for i in range(7)]
    together = encode_texts(tiny, texts)
    monkeypatch.setattr(clip_module, "_TEXTS_PER_FORWARD", 3)
    torch.testing.assert_close(encode_texts(tiny, texts), together)


def test_no_texts_give_no_rows(tiny: Any) -> None:
    assert encode_texts(tiny, []).shape == (0, TINY.clip.embed_dim)


def test_an_over_long_text_is_cut_and_keeps_its_end_of_text(tiny: Any) -> None:
    words = ["shirt"] * 200
    fitting = TINY.clip.context_length - 2  # start and end of text take two places
    long, cut, shorter = encode_texts(
        tiny, [" ".join(words), " ".join(words[:fitting]), " ".join(words[: fitting - 1])]
    )
    torch.testing.assert_close(long, cut)
    assert not torch.allclose(long, shorter, atol=1e-5)


def test_category_names_are_embedded_in_their_prompt(tiny: Any) -> None:
    found = category_embeddings(tiny, ["cat", "hot dog"], "a photo of a {}.")
    torch.testing.assert_close(found, encode_texts(tiny, ["a photo of a cat.", "a photo of a hot dog."]))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("template", ["a photo", "{} and {}"])
def test_a_template_without_one_place_for_the_name_is_refused(tiny: Any, template: str) -> None:
    with pytest.raises(ConfigError, match=r"exactly one \{\}"):
        category_embeddings(tiny, ["cat"], template)


def test_one_seed_gives_one_set_of_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(123)
    expected_next = torch.rand(3)
    torch.manual_seed(123)
    first, record = load_clip(TINY.clip, RandomWeights(5))
    torch.testing.assert_close(torch.rand(3), expected_next, rtol=0, atol=0)
    again, _ = load_clip(TINY.clip, RandomWeights(5))
    other, _ = load_clip(TINY.clip, RandomWeights(6))
    one, two, three = (model.state_dict() for model in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["visual.proj"], three["visual.proj"])
    assert record.label == "random(seed=5)"


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "training checkpoint", "half"])
def test_a_file_in_the_public_layout_loads(tmp_path: Path, tiny: Any, form: str) -> None:
    state = tiny.state_dict()
    path = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "training checkpoint":
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        wrapped["module.logit_scale"] = wrapped["module.logit_scale"].reshape(1)
        torch.save({"epoch": 1, "state_dict": wrapped}, path)
    else:
        torch.save(
            {name: tensor.half() if form == "half" else tensor for name, tensor in state.items()}, path
        )
    model, record = load_clip(TINY.clip, FileWeights(path))
    tolerance = 1e-3 if form == "half" else 0.0
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, about TorchScript as such
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_only_a_published_torchscript_archive_is_opened(
    tmp_path: Path, tiny: Any, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _ = load_clip(TINY.clip, RandomWeights(0))
    original.eval()
    original.register_buffer("input_resolution", torch.tensor(96))  # OpenAI's archive has such constants
    path = tmp_path / "archive.pt"
    torch.jit.trace(original, (pixels, open_clip.tokenize(["a", "b"])), check_trace=False).save(path)
    with pytest.raises(WeightsError, match="TorchScript archive"):
        load_clip(TINY.clip, FileWeights(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(clip_module, "_PUBLISHED_ARCHIVES", {digest: path.name})
    model, record = load_clip(TINY.clip, FileWeights(path))
    assert all(torch.equal(tensor, tiny.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert record.sha256 == digest


def test_the_published_archive_is_the_one_that_open_clip_downloads() -> None:
    url = open_clip.get_pretrained_cfg(PAPER.clip.name, "openai")["url"]
    digest, name = url.split("/")[-2:]
    assert {digest: name} == clip_module._PUBLISHED_ARCHIVES


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path, tiny: Any) -> None:
    state = dict(tiny.state_dict())
    state["visual.class_embedding"] = torch.zeros(7)
    state["text.extra"] = torch.zeros(1)
    path = tmp_path / "clip.pt"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"1 unexpected: text\.extra") as caught:
        load_clip(TINY.clip, FileWeights(path))
    assert "visual.class_embedding [7] instead of [128]" in str(caught.value)
