"""What an extraction is about: the selected expressions, their images, and where the images lie."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ris_cache.datasets import ExpressionRecord, ImageRecord, ImageRoots, ReferringDataset, Selection
from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.selection import select_split
from ris_cache.errors import DataError
from ris_cache.store.files import sha256_file
from ris_cache.store.planning import NewImage, require_same_image
from ris_cache.store.tables import CachedImage

logger = logging.getLogger(__name__)

_MAX_LISTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One dataset and those of its expressions that were selected.

    Attributes:
        incomplete_splits: splits of which `expressions` holds a part only.
    """

    table_name: str
    dataset: ReferringDataset
    expressions: tuple[ExpressionRecord, ...]
    incomplete_splits: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Everything that an extraction reads.

    Attributes:
        images: by image_id, ascending.
        paths: where each image lies; None where no folder has it.
    """

    parts: tuple[Part, ...]
    images: Mapping[int, ImageRecord]
    paths: Mapping[int, Path | None]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd in the datasets."""
        return tuple(warning for part in self.parts for warning in part.dataset.warnings)

    def needing_features(self, known: Mapping[int, CachedImage], cache_root: Path) -> list[NewImage]:
        """Return the images to compute: unknown ones, and quarantined ones whose file is another by now.

        Raises:
            DataError: an image_id that the cache knows with another name or size.
        """
        wanted = []
        for image_id, record in self.images.items():
            image = known.get(image_id)
            if image is not None:
                require_same_image(image, record, record.namespace, cache_root)
            if image is None or (image.is_quarantined and self._has_changed(image)):
                wanted.append(
                    NewImage(
                        image_id=image_id,
                        file_name=record.file_name,
                        height=record.height,
                        width=record.width,
                        namespace=record.namespace,
                    )
                )
        return wanted

    def require_readable(self, known: Mapping[int, CachedImage]) -> None:
        """Refuse images that are missing, or that the cache has quarantined and whose file is still the same.

        Raises:
            DataError: naming some of them.
        """
        problems = [
            f"{self.images[i].file_name} is missing" for i, path in self.paths.items() if path is None
        ]
        for image_id in self.images:
            image = known.get(image_id)
            if image is not None and image.reason is not None and not self._has_changed(image):
                problems.append(image.reason)
        if problems:
            raise DataError(
                f"{len(problems)} of {len(self.images)} images cannot be extracted, for example: "
                f"{'; '.join(problems[:_MAX_LISTED])}. Repair the files, or leave out --strict to have the "
                "images quarantined.",
                num_problems=len(problems),
            )

    def _has_changed(self, image: CachedImage) -> bool:
        path = self.paths[image.image_id]
        if path is None:
            return False
        try:
            return sha256_file(path).sha256 != image.sha256
        except OSError:
            return False


def load_sources(selections: Sequence[Selection], data_root: Path, *, limit: int | None = None) -> Sources:
    """Load the annotations of each dataset once and find the images.

    Args:
        data_root: holds a folder for each dataset and the images.
        limit: take the first so many images only, in order of the expressions.

    Raises:
        DataError: annotations that are missing or contradict each other, also those of two datasets on one
            image; or none of the images is there.
    """
    parts = _load_parts(selections, data_root)
    if limit is not None:
        parts = list(_limited(parts, limit))
    images = _images(parts)
    roots = ImageRoots(data_root)
    paths = {image_id: roots.path_of(record.file_name) for image_id, record in images.items()}
    if images and not any(paths.values()):
        roots.resolve(images.values())  # says where it looked
    return Sources(parts=tuple(parts), images=images, paths=paths)


def _load_parts(selections: Sequence[Selection], data_root: Path) -> list[Part]:
    parts: dict[str, Part] = {}
    for selection in selections:
        name = selection.table_name
        known = parts.get(name)
        dataset = known.dataset if known else load_dataset(data_root, selection.dataset, selection.split_by)
        chosen = dataset.expressions if selection.split is None else select_split(dataset, selection.split)
        if known:
            splits = {expression.split for expression in (*known.expressions, *chosen)}
            chosen = tuple(expression for expression in dataset.expressions if expression.split in splits)
        parts[name] = Part(table_name=name, dataset=dataset, expressions=chosen)
    return list(parts.values())


def _images(parts: Sequence[Part]) -> dict[int, ImageRecord]:
    """Return the images of the expressions by ascending image_id."""
    images: dict[int, ImageRecord] = {}
    for part in parts:
        for image_id in dict.fromkeys(expression.image_id for expression in part.expressions):
            record = part.dataset.images[image_id]
            known = images.setdefault(image_id, record)
            if known != record:
                raise DataError(
                    f"Image {image_id} is {record} in {part.table_name}, but {known} in another of the "
                    "selected datasets. Check that their annotation files belong together.",
                    image_id=image_id,
                    expected=known,
                    found=record,
                )
    return dict(sorted(images.items()))


def _limited(parts: Sequence[Part], limit: int) -> Iterator[Part]:
    in_order = dict.fromkeys(expression.image_id for part in parts for expression in part.expressions)
    kept_images = set(itertools.islice(in_order, limit))
    for part in parts:
        kept = tuple(expression for expression in part.expressions if expression.image_id in kept_images)
        left_out = {e.split for e in part.expressions if e.image_id not in kept_images}
        if kept:
            yield replace(part, expressions=kept, incomplete_splits=frozenset(left_out))
