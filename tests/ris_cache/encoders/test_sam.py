"""SAM's parts against segment_anything's own build and forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from ris_cache.encoders import sam as sam_module
from ris_cache.encoders.sam import SamParts, attend_by_head, attend_folded, build_sam, encode_sam, load_sam
from ris_cache.encoders.spec import PAPER, TINY
from ris_cache.encoders.weights import FileWeights, RandomWeights
from ris_cache.errors import ShapeError, WeightsError


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def num_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def tiny() -> SamParts:
    parts, _ = load_sam(TINY.sam, RandomWeights(0))
    parts.image_encoder.eval().requires_grad_(False)
    return parts


@pytest.fixture
def pixels() -> torch.Tensor:
    side = TINY.sam.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_the_paper_preset_has_the_public_vit_b_layout() -> None:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        ours = build_sam(PAPER.sam).as_module().state_dict()
        public = sam_model_registry["vit_b"]().state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in public.items()
    }


def test_the_paper_preset_has_the_published_parameter_counts() -> None:
    with torch.device("meta"):
        parts = build_sam(PAPER.sam)
    assert round(num_parameters(parts.image_encoder) / 1e6, 2) == 89.67
    assert num_parameters(parts.mask_decoder) == 4_058_340


def test_the_paper_preset_has_the_public_hyper_parameters() -> None:
    from segment_anything import sam_model_registry

    def settings(module: torch.nn.Module) -> dict[str, tuple[object, ...]]:
        """What shapes do not show: norms' epsilons, windows, heads and scales."""
        names = ("eps", "window_size", "num_heads", "scale", "num_multimask_outputs", "input_image_size")
        return {
            path: tuple(getattr(part, name, None) for name in names) for path, part in module.named_modules()
        }

    with torch.device("meta"):
        ours, public = build_sam(PAPER.sam).as_module(), sam_model_registry["vit_b"]()
    for part in ("image_encoder", "prompt_encoder", "mask_decoder"):
        assert settings(ours.get_submodule(part)) == settings(public.get_submodule(part))


def test_random_position_parameters_are_not_zero(tiny: SamParts) -> None:
    positions = {
        name: parameter
        for name, parameter in tiny.image_encoder.named_parameters()
        if "pos_embed" in name or "rel_pos" in name
    }
    assert len(positions) == 1 + 2 * TINY.sam.depth
    assert all(parameter.std() > 0.01 for parameter in positions.values())


def test_encoding_equals_the_librarys_forward(tiny: SamParts, pixels: torch.Tensor) -> None:
    expected = tiny.image_encoder(pixels)
    found = encode_sam(tiny.image_encoder, pixels)
    assert found.shape == (2, *TINY.feature_shapes()["sam"])
    assert relative_error(found, expected) < 1e-5


def test_the_relative_positions_matter_to_that_equality(tiny: SamParts, pixels: torch.Tensor) -> None:
    changed, _ = load_sam(TINY.sam, RandomWeights(0))
    changed.image_encoder.requires_grad_(False)
    for block in changed.image_encoder.blocks:
        block.attn.rel_pos_w.zero_()
    difference = relative_error(
        encode_sam(changed.image_encoder, pixels), encode_sam(tiny.image_encoder, pixels)
    )
    assert difference > 1e-3


def test_an_encoder_without_relative_positions_runs_too(pixels: torch.Tensor) -> None:
    from segment_anything.modeling import ImageEncoderViT

    torch.manual_seed(0)
    side = TINY.sam.image_size
    plain = ImageEncoderViT(
        img_size=side, patch_size=16, embed_dim=32, depth=1, num_heads=2, out_chans=8, use_abs_pos=False
    ).requires_grad_(False)
    assert relative_error(encode_sam(plain, pixels), plain(pixels)) < 1e-5


def test_a_batch_equals_its_images_one_by_one(tiny: SamParts, pixels: torch.Tensor) -> None:
    together = encode_sam(tiny.image_encoder, pixels)
    apart = torch.cat([encode_sam(tiny.image_encoder, image[None]) for image in pixels])
    assert relative_error(together, apart) < 1e-5


def attention_inputs(
    height: int, width: int, *, num_heads: int, head_width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [2, heads, H·W, D] and tables of offsets [2H - 1, D], [2W - 1, D], large enough to matter."""
    generator = torch.Generator().manual_seed(height * 100 + width)
    qkv = torch.randn(3, 2, num_heads, height * width, head_width, generator=generator)
    row_table = 0.5 * torch.randn(2 * height - 1, head_width, generator=generator)
    col_table = 0.5 * torch.randn(2 * width - 1, head_width, generator=generator)
    return *qkv.unbind(), row_table, col_table


def by_offset(table: torch.Tensor) -> torch.Tensor:
    """Entry [q, k] is the table's row of offset q - k, written as a loop."""
    size = (len(table) + 1) // 2
    return torch.stack([torch.stack([table[q - k + size - 1] for k in range(size)]) for q in range(size)])


def library_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_table: torch.Tensor,
    col_table: torch.Tensor,
    size: tuple[int, int],
) -> torch.Tensor:
    """What segment_anything computes between its two projections, in the dtype of the inputs."""
    from segment_anything.modeling.image_encoder import add_decomposed_rel_pos

    flat_q, flat_k = q.flatten(0, 1), k.flatten(0, 1)
    logits = (flat_q * q.shape[-1] ** -0.5) @ flat_k.transpose(1, 2)
    logits = add_decomposed_rel_pos(logits, flat_q, row_table, col_table, size, size)
    return (logits.softmax(dim=-1) @ v.flatten(0, 1)).view_as(q)


@pytest.mark.parametrize("attend", [attend_by_head, attend_folded])
@pytest.mark.parametrize(
    ("height", "width", "num_heads", "head_width"),
    [(14, 14, 12, 64), (16, 16, 4, 32), (7, 7, 4, 32), (3, 5, 2, 8), (1, 1, 1, 4)],
)
def test_both_ways_to_attend_equal_the_librarys(
    attend: Callable[..., torch.Tensor], height: int, width: int, num_heads: int, head_width: int
) -> None:
    *qkv, row_table, col_table = attention_inputs(height, width, num_heads=num_heads, head_width=head_width)
    exact = library_attention(
        *(x.double() for x in (*qkv, row_table, col_table)), (height, width)
    )  # in float64, so that the error found is ours
    found = attend(*qkv, by_offset(row_table), by_offset(col_table))
    assert relative_error(found.double(), exact) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [14, 24])
def test_folding_loses_no_more_in_half_precision_than_a_bias(dtype: torch.dtype, size: int) -> None:
    *qkv, row_table, col_table = attention_inputs(size, size, num_heads=4, head_width=64)
    rows, cols = by_offset(row_table), by_offset(col_table)
    # Rounded inputs for both, so that only what happens inside is compared.
    qkv, rows, cols = [x.to(dtype) for x in qkv], rows.to(dtype), cols.to(dtype)
    exact = attend_by_head(*(x.double() for x in (*qkv, rows, cols)))
    errors = {
        attend.__name__: ((attend(*qkv, rows, cols).double() - exact).norm() / exact.norm()).item()
        for attend in (attend_by_head, attend_folded)
    }
    assert errors["attend_folded"] < errors["attend_by_head"]
    assert errors["attend_folded"] < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "head_width"), [(14, 64), (64, 64), (7, 32)])
def test_folded_attention_of_every_size_in_use_runs_in_a_flash_kernel(
    device: str, dtype: torch.dtype, size: int, head_width: int
) -> None:
    *qkv, row_table, col_table = attention_inputs(size, size, num_heads=1, head_width=head_width)
    tensors = [x.to(device, dtype) for x in (*qkv, by_offset(row_table), by_offset(col_table))]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # any other kernel is an error in here
        assert attend_folded(*tensors).isfinite().all()


@pytest.mark.parametrize(
    ("arithmetic", "expected"),
    [(None, "attend_by_head"), (torch.float16, "attend_folded"), (torch.bfloat16, "attend_folded")],
)
def test_the_cpu_takes_the_faster_way_for_its_arithmetic(
    tiny: SamParts,
    pixels: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    arithmetic: torch.dtype | None,
    expected: str,
) -> None:
    taken = []
    for name, attend in (("attend_by_head", attend_by_head), ("attend_folded", attend_folded)):

        def record(*arguments: torch.Tensor, name: str = name, attend: Callable[..., torch.Tensor] = attend):
            taken.append(name)
            return attend(*arguments)

        monkeypatch.setattr(sam_module, name, record)
    with torch.autocast("cpu", dtype=arithmetic, enabled=arithmetic is not None):
        encode_sam(tiny.image_encoder, pixels)
    assert taken == [expected] * TINY.sam.depth


def test_the_folded_way_encodes_as_the_library_does(
    tiny: SamParts, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam_module, "attend_by_head", attend_folded)
    assert relative_error(encode_sam(tiny.image_encoder, pixels), tiny.image_encoder(pixels)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 128, 128), (1, 1, 128, 128)])
def test_pixels_of_another_shape_are_refused(tiny: SamParts, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"takes \[B, 3, 128, 128\]"):
        encode_sam(tiny.image_encoder, torch.zeros(shape))


@pytest.mark.slow
def test_at_full_image_size_and_width_encoding_equals_the_librarys_forward() -> None:
    parts, _ = load_sam(PAPER.sam, RandomWeights(0))
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = encode_sam(parts.image_encoder, pixels)
        expected = parts.image_encoder(pixels)
    assert found.shape == (1, *PAPER.feature_shapes()["sam"])
    assert relative_error(found, expected) < 1e-4


def test_one_seed_gives_one_set_of_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(123)
    expected_next = torch.rand(3)
    torch.manual_seed(123)
    first, record = load_sam(TINY.sam, RandomWeights(5))
    torch.testing.assert_close(torch.rand(3), expected_next, rtol=0, atol=0)
    again, _ = load_sam(TINY.sam, RandomWeights(5))
    other, _ = load_sam(TINY.sam, RandomWeights(6))
    one, two, three = (parts.as_module().state_dict() for parts in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["image_encoder.pos_embed"], three["image_encoder.pos_embed"])
    assert record.label == "random(seed=5)"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("with_buffers", [False, True])
def test_a_file_in_the_public_layout_loads(
    tmp_path: Path, tiny: SamParts, suffix: str, with_buffers: bool
) -> None:
    state = dict(tiny.as_module().state_dict())
    if with_buffers:
        state |= {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    path = tmp_path / f"sam{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    parts, record = load_sam(TINY.sam, FileWeights(path))
    loaded = parts.as_module().state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    assert record.kind == "file"
    assert record.origin == str(path)


def test_weights_of_another_architecture_are_refused_by_name(tmp_path: Path, tiny: SamParts) -> None:
    state = tiny.as_module().state_dict()
    del state["mask_decoder.iou_token.weight"]
    state["image_encoder.pos_embed"] = torch.zeros(1, 2, 2, 128)
    path = tmp_path / "sam.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"1 missing: mask_decoder\.iou_token\.weight") as caught:
        load_sam(TINY.sam, FileWeights(path))
    assert "image_encoder.pos_embed [1, 2, 2, 128] instead of [1, 16, 16, 128]" in str(caught.value)
