"""Both encoders together: what stage 1 gets out of pixels."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ris_cache.encoders.clip import load_clip
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import normalise
from ris_cache.encoders.sam import build_mask_decoder, build_prompt_encoder, load_sam
from ris_cache.encoders.spec import TINY
from ris_cache.encoders.weights import FileWeights, RandomWeights
from ris_cache.errors import ConfigError, ShapeError, WeightsError


def load_tiny(seed: int = 0, **options: Any) -> FrozenEncoders:
    return FrozenEncoders.load(
        TINY, sam_source=RandomWeights(seed), clip_source=RandomWeights(seed), **options
    )


@pytest.fixture(scope="module")
def encoders() -> FrozenEncoders:
    return load_tiny()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in [(40, 60), (61, 33)]
    ]


@pytest.fixture(scope="module")
def frames(encoders: FrozenEncoders, images: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    sam, clip = zip(*(encoders.prepare(image) for image in images), strict=True)
    return torch.from_numpy(np.stack(sam)), torch.from_numpy(np.stack(clip))


def test_each_input_frame_is_resampled_once_from_the_original(
    encoders: FrozenEncoders, images: list[np.ndarray]
) -> None:
    sam, clip = encoders.prepare(images[0])
    original = Image.fromarray(images[0])
    np.testing.assert_array_equal(sam, np.asarray(original.resize((128, 128), Image.Resampling.BILINEAR)))
    np.testing.assert_array_equal(
        clip, np.asarray(original.resize((TINY.clip.image_size,) * 2, Image.Resampling.BICUBIC))
    )


def test_features_equal_the_libraries_plain_forwards(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    features = encoders.encode(*frames)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in features.items()} == TINY.feature_shapes()
    assert all(tensor.dtype == torch.float32 for tensor in features.values())

    sam, _ = load_sam(TINY.sam, RandomWeights(0))
    clip, _ = load_clip(TINY.clip, RandomWeights(0))
    clip.eval()
    last_block: list[torch.Tensor] = []
    clip.visual.transformer.resblocks[-1].register_forward_hook(lambda *call: last_block.append(call[2]))
    with torch.no_grad():
        expected_sam = sam.image_encoder(normalise(frames[0], TINY.sam.normalisation))
        expected_pooled = clip.encode_image(normalise(frames[1], TINY.clip.normalisation))
    torch.testing.assert_close(features["sam"], expected_sam, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["clip"], last_block[0][:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["clip_pooled"], expected_pooled, rtol=1e-4, atol=1e-4)


def test_a_batch_equals_its_images_one_by_one(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    together = encoders.encode(*frames)
    for i in range(2):
        alone = encoders.encode(frames[0][i : i + 1], frames[1][i : i + 1])
        for name, tensor in alone.items():
            torch.testing.assert_close(tensor[0], together[name][i], rtol=1e-4, atol=1e-4)


def test_no_parameter_ever_requires_grad_and_features_feed_a_trainable_module(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    sam = encoders.sam
    for network in (sam.image_encoder, sam.prompt_encoder, sam.mask_decoder, encoders.clip):
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert not any(module.training for module in network.modules())
    features = encoders.encode(*frames)
    assert not any(tensor.requires_grad for tensor in features.values())
    head = torch.nn.Linear(TINY.clip.embed_dim, 1)
    head(features["clip_pooled"]).sum().backward()
    assert head.weight.grad is not None


def test_one_seed_gives_one_set_of_features_and_leaves_the_global_generator_alone(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    state = torch.get_rng_state()
    again = load_tiny()
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = (each.encode(*frames) for each in (encoders, again, load_tiny(seed=1)))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert not torch.allclose(tensor, other[name], atol=1e-2)


@pytest.mark.parametrize(("arithmetic", "bound"), [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_half_precision_comes_back_as_float32_and_near_the_full_one(
    encoders: FrozenEncoders,
    frames: tuple[torch.Tensor, torch.Tensor],
    arithmetic: str,
    bound: float,
) -> None:
    half = load_tiny(arithmetic=arithmetic)
    assert half.arithmetic == arithmetic
    expected = encoders.encode(*frames)
    for name, tensor in half.encode(*frames).items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, expected[name])
        error = (tensor - expected[name]).norm() / expected[name].norm()
        assert error < bound


def test_the_cpu_computes_in_float32_unless_told_otherwise(encoders: FrozenEncoders) -> None:
    assert encoders.arithmetic == "float32"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("arithmetic", "bound"), [("float32", 5e-3), ("auto", 1e-2), ("bfloat16", 3e-2)])
def test_a_cuda_device_gives_the_cpus_features(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor], arithmetic: str, bound: float
) -> None:
    on_device = load_tiny(device="cuda", arithmetic=arithmetic)
    assert on_device.arithmetic == ("float16" if arithmetic == "auto" else arithmetic)
    expected = encoders.encode(*frames)
    for name, tensor in on_device.encode(*frames).items():
        assert tensor.device.type == "cuda"
        assert (tensor.cpu() - expected[name]).norm() / expected[name].norm() < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_encoding_pinned_pixels_never_waits_for_the_device(
    frames: tuple[torch.Tensor, torch.Tensor],
) -> None:
    on_device = load_tiny(device="cuda")
    pinned = [pixels.pin_memory() for pixels in frames]
    on_device.encode(*pinned)  # the first call sets libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        features = on_device.encode(*pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(tensor.device.type == "cuda" for tensor in features.values())


def test_an_unknown_arithmetic_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'int4'; known: auto, float32, float16, bfloat16"):
        load_tiny(arithmetic="int4")


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiled_encoders_give_the_same_features_for_every_batch_size(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    compiled = load_tiny(compile=True)
    assert compiled.compiled
    assert not encoders.compiled
    for size in (2, 1):
        pixels = [batch[:size] for batch in frames]
        expected = encoders.encode(*pixels)
        for name, tensor in compiled.encode(*pixels).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiling_without_a_compiler_says_what_is_missing() -> None:
    import torch._inductor.config as inductor

    absent = "/nowhere/g++"
    torch.compiler.reset()  # what this process has compiled needs no compiler any more
    with (
        inductor.patch({"cpp.cxx": (None, absent)}),
        pytest.raises(ConfigError, match=rf"{re.escape(absent)}.*needs a working C\+\+ compiler.*\$CXX"),
    ):
        load_tiny(compile=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_cuda_device_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        load_tiny(device="cuda:0")


def test_batches_that_differ_are_refused(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with pytest.raises(ShapeError, match="2 images for SAM but 1 for CLIP"):
        encoders.encode(frames[0], frames[1][:1])


def test_frames_of_the_other_encoder_are_refused(
    encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    with pytest.raises(ShapeError, match="takes"):
        encoders.encode(frames[1], frames[0])


def test_the_heads_carry_public_names_and_fit_freshly_built_heads(encoders: FrozenEncoders) -> None:
    heads = encoders.sam_heads()
    assert {name.partition(".")[0] for name in heads} == {"mask_decoder", "prompt_encoder"}
    for prefix, head in (
        ("mask_decoder.", build_mask_decoder(TINY.sam)),
        ("prompt_encoder.", build_prompt_encoder(TINY.sam)),
    ):
        own = {name.removeprefix(prefix): value for name, value in heads.items() if name.startswith(prefix)}
        head.load_state_dict(own, strict=True)


def test_changing_the_returned_heads_does_not_change_the_encoders(encoders: FrozenEncoders) -> None:
    name = "mask_decoder.iou_token.weight"
    before = encoders.sam_heads()[name]
    encoders.sam_heads()[name].zero_()
    assert torch.equal(encoders.sam_heads()[name], before)


def test_texts_and_categories_are_embedded_in_one_space(encoders: FrozenEncoders) -> None:
    categories = encoders.category_embeddings(["cat", "dog"])
    texts = encoders.encode_texts(["a photo of a dog.", "a photo of a cat."])
    assert (texts @ categories.T).argmax(dim=1).tolist() == [1, 0]
    assert texts.dtype == categories.dtype == torch.float32


def test_weights_from_files_give_the_same_features_and_record_their_digests(
    tmp_path: Path, encoders: FrozenEncoders, frames: tuple[torch.Tensor, torch.Tensor]
) -> None:
    sam_path, clip_path = tmp_path / "sam_vit_b_01ec64.pth", tmp_path / "clip.pt"
    torch.save(encoders.sam.as_module().state_dict(), sam_path)
    torch.save(encoders.clip.state_dict(), clip_path)
    loaded = FrozenEncoders.load(TINY, sam_source=FileWeights(sam_path), clip_source=FileWeights(clip_path))
    expected = encoders.encode(*frames)
    for name, tensor in loaded.encode(*frames).items():
        assert torch.equal(tensor, expected[name])
    digests = {
        "sam": hashlib.sha256(sam_path.read_bytes()).hexdigest(),
        "clip": hashlib.sha256(clip_path.read_bytes()).hexdigest(),
    }
    assert {name: record.sha256 for name, record in loaded.weights.items()} == digests
    assert json.loads(json.dumps(loaded.weights["sam"].as_dict())) == {
        "kind": "file",
        "sha256": digests["sam"],
        "seed": None,
    }


def test_swapped_files_are_refused(tmp_path: Path, encoders: FrozenEncoders) -> None:
    sam_path, clip_path = tmp_path / "sam.pth", tmp_path / "clip.pt"
    torch.save(encoders.sam.as_module().state_dict(), sam_path)
    torch.save(encoders.clip.state_dict(), clip_path)
    with pytest.raises(WeightsError, match=r"clip\.pt does not fit"):
        FrozenEncoders.load(TINY, sam_source=FileWeights(clip_path), clip_source=FileWeights(clip_path))
    with pytest.raises(WeightsError, match=r"sam\.pth does not fit"):
        FrozenEncoders.load(TINY, sam_source=FileWeights(sam_path), clip_source=FileWeights(sam_path))
