"""From one row per image to one row per sample.

B samples, I images.
"""

from __future__ import annotations

from torch import Tensor


def per_sample(per_image: Tensor, image_index: Tensor | None) -> Tensor:
    """Repeat the row of each image for every sample of it.

    Args:
        per_image: [I, …].
        image_index: int64[B], the row of each sample; None says that row i is sample i's already.

    Returns:
        [B, …].
    """
    return per_image if image_index is None else per_image.index_select(0, image_index)
