"""SAM's mask decoder over a batch of different images.

`segment_anything.MaskDecoder.forward` takes one image with many prompts and repeats the image. Referring
segmentation has one prompt for each of many images, so this module runs the same weights over the batch.

B samples, C channels, P side of SAM's embedding grid, T output tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from ris_cache.errors import WeightsError
from ris_cache.vision_imports import ensure_torchvision

ensure_torchvision()

from segment_anything.modeling import MaskDecoder, PromptEncoder  # noqa: E402


class BatchedMaskDecoder(nn.Module):
    """The first mask (index 0) of SAM's decoder for each sample of a batch; equal to a loop over samples.

    Args:
        decoder: SAM's decoder; its IoU head and the hypernetworks of masks 1 to 3 are kept, so that the
            weights stay SAM's own, and are not run: nothing here reads them.
        prompt_encoder: only its random-Fourier position encoding is taken.
    """

    def __init__(self, decoder: MaskDecoder, prompt_encoder: PromptEncoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.positions = prompt_encoder.pe_layer
        self.grid: tuple[int, int] = tuple(prompt_encoder.image_embedding_size)

    def forward(self, image_embeddings: Tensor, sparse_prompt: Tensor, dense_prompt: Tensor) -> Tensor:
        """Decode one mask per sample.

        Args:
            image_embeddings: float[B, C, P, P], SAM's neck output.
            sparse_prompt: float[B, 1, C], joined to SAM's own tokens.
            dense_prompt: float[B, C, P, P], added to the image embeddings.

        Returns:
            float[B, 4P, 4P] mask logits over the squashed input frame.
        """
        batch_size = image_embeddings.shape[0]
        own_tokens = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        tokens = torch.cat([own_tokens.expand(batch_size, -1, -1), sparse_prompt], dim=1)
        source = image_embeddings + dense_prompt
        positions = self.positions(self.grid).unsqueeze(0).to(source.dtype)
        tokens_out, source_out = self.decoder.transformer(source, positions, tokens)
        cells = source_out.transpose(1, 2).reshape(source.shape)
        upscaled = self.decoder.output_upscaling(cells)
        # Token 0 is SAM's IoU token, token 1 its single-output mask token.
        weights = self.decoder.output_hypernetworks_mlps[0](tokens_out[:, 1])
        return torch.einsum("bc,bchw->bhw", weights, upscaled)


def load_sam_heads(module: BatchedMaskDecoder, heads: Mapping[str, npt.NDArray[Any]]) -> None:
    """Start from SAM's own decoder and position encoding, as the cache keeps them.

    Args:
        module: loaded in place.
        heads: tensors of `mask_decoder.*` and `prompt_encoder.*`, named as in SAM's public checkpoint.

    Raises:
        WeightsError: a tensor is missing or of another shape.
    """
    names = {
        "decoder.": "mask_decoder.",
        "positions.": "prompt_encoder.pe_layer.",
    }
    state = {}
    for name, tensor in module.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        source = names[prefix] + name.removeprefix(prefix)
        found = heads.get(source)
        if found is None or found.shape != tensor.shape:
            raise WeightsError(
                f"SAM's heads in the cache do not fit: {source} is "
                f"{'missing' if found is None else tuple(found.shape)}, expected {tuple(tensor.shape)}. "
                "Extract the cache anew.",
                name=source,
            )
        state[name] = torch.from_numpy(found)
    module.load_state_dict(state)
