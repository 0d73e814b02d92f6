"""The tables of an extraction: expressions with the categories that CLIP predicts, instances, categories."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import StoppedError
from ris_cache.extraction.sources import Part
from ris_cache.store.draft import CacheDraft
from ris_cache.store.tables import NO_CATEGORY, CategorySet

_TEXT_BATCH = 256


def write_annotations(
    draft: CacheDraft, part: Part, encoders: FrozenEncoders, should_stop: Callable[[], bool]
) -> None:
    """Add one dataset to a draft; texts of splits that the draft has are not embedded again.

    Raises:
        DataError: the draft has other content by the same names.
        StoppedError: `should_stop` said so; the draft is of no use then.
    """
    categories = part.dataset.categories
    ids = np.array([category.category_id for category in categories])
    names = tuple(category.name for category in categories)
    sizes: dict[str, int] = {}
    for expression in part.expressions:
        sizes[expression.split] = sizes.get(expression.split, 0) + 1
    known = {
        split
        for split, size in sizes.items()
        if draft.has_split(part.table_name, split, num_expressions=size)
    }
    texts = [expression.sent for expression in part.expressions if expression.split not in known]
    if texts or not draft.has_category_set(part.table_name):
        embeddings = encoders.category_embeddings(names).cpu()
        draft.write_categories(
            part.table_name,
            CategorySet(
                ids=tuple(int(category_id) for category_id in ids),
                names=names,
                template=encoders.spec.clip.prompt_template,
                embeddings=embeddings.numpy(),
            ),
        )
        nearest = iter(ids[nearest_categories(texts, embeddings, encoders, should_stop)])
    else:
        nearest = iter(())
    image_ids = {expression.image_id for expression in part.expressions}
    draft.write_tables(
        part.table_name,
        part.expressions,
        [instance for instance in part.dataset.instances.values() if instance.image_id in image_ids],
        # A split that the draft has keeps the categories it has.
        clip_category_ids=[
            NO_CATEGORY if expression.split in known else int(next(nearest))
            for expression in part.expressions
        ],
        category_set=part.table_name,
        incomplete_splits=part.incomplete_splits,
    )


def nearest_categories(
    texts: Sequence[str],
    embeddings: torch.Tensor,
    encoders: FrozenEncoders,
    should_stop: Callable[[], bool] = lambda: False,
) -> npt.NDArray[np.int64]:
    """Return the index of the category whose embedding is nearest to each text's.

    Args:
        embeddings: float32[K, D], normalised as the texts' are, so the cosine is a product.

    Returns:
        int64[texts].
    """
    if not texts:
        return np.zeros(0, np.int64)
    # Annotators repeat themselves ("left", "man in red"), so each different text is encoded once.
    different, inverse = np.unique(np.array(texts), return_inverse=True)
    nearest = []
    for start in range(0, len(different), _TEXT_BATCH):
        if should_stop():
            raise StoppedError("Stopped while embedding expressions; all features are done.")
        texts_embedded = encoders.encode_texts(list(different[start : start + _TEXT_BATCH])).cpu()
        nearest.append((texts_embedded @ embeddings.T).argmax(dim=1))
    found: npt.NDArray[np.int64] = torch.cat(nearest).numpy()[inverse]
    return found
