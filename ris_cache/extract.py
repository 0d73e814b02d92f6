"""Stage 1: from public dataset files and images to a feature cache.

Plan (which images are missing) → decode and squash on threads → encode in batches → write shard by shard →
tables, categories, SAM's heads → manifest.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ris_cache.ahead import map_ahead
from ris_cache.datasets import ExpressionRecord, ImageRoots, ReferringDataset, Selection, select_split
from ris_cache.datasets.refer import load_refer
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.errors import CacheError, DataError
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.manifest import Manifest
from ris_cache.store.tables import CachedImage, CategorySet
from ris_cache.store.writer import CacheWriter

STORE_DTYPE = np.dtype(np.float16)
_TEXT_BATCH = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionReport:
    """What one extraction did.

    Attributes:
        manifest: of the finished cache.
        added: images whose features were computed.
        present: images that the cache held already.
        quarantined: reason by image_id of images that could not be read this time.
        warnings: what was odd in the datasets.
    """

    manifest: Manifest
    added: int
    present: int
    quarantined: dict[int, str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One dataset and those of its expressions that were selected."""

    table_name: str
    dataset: ReferringDataset
    expressions: tuple[ExpressionRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    """One image ready for the encoders, or why it is not."""

    image_id: int
    sha256: str | None
    sam_pixels: npt.NDArray[np.uint8] | None
    clip_pixels: npt.NDArray[np.uint8] | None
    reason: str | None


def extract(
    selections: Sequence[Selection],
    *,
    data_root: Path,
    cache_root: Path,
    encoders: FrozenEncoders,
    batch_size: int,
    strict: bool = False,
    workers: int | None = None,
    show_progress: bool = False,
) -> ExtractionReport:
    """Bring a cache to hold the features and tables of the selected expressions.

    Images that the cache has already are not computed again; those it has quarantined are tried again.

    Args:
        selections: what to extract.
        data_root: holds `<dataset>/refs(<split_by>).p`, `<dataset>/instances.json` and the images.
        cache_root: new, empty, or a cache made by the same encoders.
        encoders: loaded.
        batch_size: images per forward pass.
        strict: whether an unreadable image is an error; otherwise it is quarantined and reported.
        workers: decoding threads; by default one per processor, at most 8.
        show_progress: whether to draw a bar on stderr.

    Raises:
        DataError: annotations or images that are missing or contradict each other; an image whose size is
            not the annotated one is always an error, since the masks would not fit it.
        FingerprintMismatchError: the cache was made by other encoders.
        CacheError: too little space on the disk.
    """
    parts = _load(selections, data_root)
    images = {
        expression.image_id: part.dataset.images[expression.image_id]
        for part in parts
        for expression in part.expressions
    }
    paths = ImageRoots(data_root).resolve(images.values())
    shapes = encoders.spec.feature_shapes()
    weights = {role: record.as_dict() for role, record in encoders.weights.items()}
    writer = CacheWriter.create(
        cache_root,
        cache_fingerprint(encoders.spec, weights, dtype=STORE_DTYPE.name),
        preset=encoders.spec.preset,
        shapes=shapes,
        weights={role: record.label for role, record in encoders.weights.items()},
        dtype=STORE_DTYPE.name,
        libraries={"torch": torch.__version__},
    )
    rows = writer.add_images([images[image_id] for image_id in sorted(images)], retry_quarantined=True)
    _require_space(cache_root, len(rows), shapes)

    quarantined: dict[int, str] = {}
    shards = sorted({row // writer.shard_rows for row in rows.values()})
    with tqdm(total=len(rows), unit="image", desc="extract", disable=not show_progress) as bar:
        for shard in shards:
            quarantined |= _write_shard(
                writer,
                shard,
                paths,
                encoders,
                batch_size=batch_size,
                strict=strict,
                workers=workers or min(8, os.cpu_count() or 1),
                bar=bar,
            )
            bar.set_postfix(quarantined=len(quarantined))
    for part in parts:
        _write_tables(writer, part, encoders)
    writer.write_sam_heads({name: tensor.numpy() for name, tensor in encoders.sam_heads().items()})
    return ExtractionReport(
        manifest=writer.finish(),
        added=len(rows) - len(quarantined),
        present=len(images) - len(rows),
        quarantined=quarantined,
        warnings=tuple(warning for part in parts for warning in part.dataset.warnings),
    )


def _load(selections: Sequence[Selection], data_root: Path) -> list[_Part]:
    """Load each dataset once and gather the expressions selected from it, in its own order."""
    parts: dict[str, _Part] = {}
    for selection in selections:
        name = selection.table_name
        known = parts.get(name)
        dataset = known.dataset if known else load_refer(data_root, selection.dataset, selection.split_by)
        chosen = dataset.expressions if selection.split is None else select_split(dataset, selection.split)
        if known:
            splits = {expression.split for expression in (*known.expressions, *chosen)}
            chosen = tuple(expression for expression in dataset.expressions if expression.split in splits)
        parts[name] = _Part(table_name=name, dataset=dataset, expressions=chosen)
    return list(parts.values())


def _require_space(cache_root: Path, num_images: int, shapes: dict[str, tuple[int, ...]]) -> None:
    needed = num_images * STORE_DTYPE.itemsize * sum(math.prod(shape) for shape in shapes.values())
    free = shutil.disk_usage(cache_root).free
    if needed > free:
        raise CacheError(
            f"{num_images} images need {needed / 2**30:.1f} GiB in {cache_root}, where "
            f"{free / 2**30:.1f} GiB are free. Free some space, choose another --cache, or fewer splits.",
            needed=needed,
            free=free,
        )


def _write_shard(
    writer: CacheWriter,
    shard: int,
    paths: dict[int, Path],
    encoders: FrozenEncoders,
    *,
    batch_size: int,
    strict: bool,
    workers: int,
    bar: tqdm[NoReturn],
) -> dict[int, str]:
    """Compute and write one shard; returns the reason by image_id of what was quarantined."""
    # float32 until the writer stores it, so that an overflow is refused by its value.
    images = writer.shard_images(shard)
    features = {
        name: np.zeros((len(images), *shape), np.float32)
        for name, shape in encoders.spec.feature_shapes().items()
    }
    quarantined: dict[int, str] = {}
    waiting: list[tuple[int, _Decoded]] = []

    def encode_waiting() -> None:
        if waiting:
            _encode([item for _, item in waiting], [row for row, _ in waiting], encoders, features)
            waiting.clear()

    decoded = map_ahead(
        lambda image: _decode(image, paths[image.image_id], encoders, strict=strict),
        images,
        workers=workers,
        depth=2 * batch_size,
    )
    for row, item in enumerate(decoded):
        if item.reason is not None:
            quarantined[item.image_id] = item.reason
            writer.quarantine(item.image_id, item.reason)
            logger.warning("quarantined: %s", item.reason)
        else:
            assert item.sha256 is not None
            writer.record_file(item.image_id, item.sha256)
            waiting.append((row, item))
        if len(waiting) == batch_size:
            encode_waiting()
        bar.update()
    encode_waiting()
    writer.write_shard(shard, features)
    return quarantined


def _decode(image: CachedImage, path: Path, encoders: FrozenEncoders, *, strict: bool) -> _Decoded:
    try:
        pixels = decode_image(path, expected_size=(image.height, image.width))
    except DataError as error:
        if strict or "expected" in error.facts:
            raise
        return _Decoded(
            image_id=image.image_id, sha256=None, sam_pixels=None, clip_pixels=None, reason=str(error)
        )
    sam_pixels, clip_pixels = encoders.prepare(pixels)
    return _Decoded(
        image_id=image.image_id,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        sam_pixels=sam_pixels,
        clip_pixels=clip_pixels,
        reason=None,
    )


def _encode(
    items: Sequence[_Decoded],
    rows: Sequence[int],
    encoders: FrozenEncoders,
    features: dict[str, npt.NDArray[np.float32]],
) -> None:
    """Run the encoders over one batch and put the results into the rows of the shard's arrays."""
    encoded = encoders.encode(
        torch.from_numpy(np.stack([item.sam_pixels for item in items if item.sam_pixels is not None])),
        torch.from_numpy(np.stack([item.clip_pixels for item in items if item.clip_pixels is not None])),
    )
    for name, tensor in encoded.items():
        features[name][rows] = tensor.cpu().numpy()


def _write_tables(writer: CacheWriter, part: _Part, encoders: FrozenEncoders) -> None:
    categories = part.dataset.categories
    ids = np.array([category.category_id for category in categories])
    names = tuple(category.name for category in categories)
    embeddings = encoders.category_embeddings(names).cpu()
    writer.write_categories(
        part.table_name,
        CategorySet(
            ids=tuple(int(category_id) for category_id in ids),
            names=names,
            template=encoders.spec.clip.prompt_template,
            embeddings=embeddings.numpy(),
        ),
    )
    nearest = _nearest_categories([expression.sent for expression in part.expressions], embeddings, encoders)
    image_ids = {expression.image_id for expression in part.expressions}
    writer.write_tables(
        part.table_name,
        part.expressions,
        [instance for instance in part.dataset.instances.values() if instance.image_id in image_ids],
        clip_category_ids=[int(category_id) for category_id in ids[nearest]],
        category_set=part.table_name,
    )


def _nearest_categories(
    texts: Sequence[str], embeddings: torch.Tensor, encoders: FrozenEncoders
) -> npt.NDArray[np.int64]:
    """Index of the category whose embedding is nearest to each text's (cosine; both are normalised)."""
    # Annotators repeat themselves ("left", "man in red"), so each different text is encoded once.
    different, inverse = np.unique(np.array(texts), return_inverse=True)
    nearest = [
        (encoders.encode_texts(list(different[start : start + _TEXT_BATCH])).cpu() @ embeddings.T).argmax(
            dim=1
        )
        for start in range(0, len(different), _TEXT_BATCH)
    ]
    found: npt.NDArray[np.int64] = torch.cat(nearest).numpy()[inverse]
    return found
