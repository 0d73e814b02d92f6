"""Find COCO images on disk, whichever of the usual folder conventions the user's copy follows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ris_cache.datasets.records import ImageRecord
from ris_cache.errors import DataError

_TRAIN_DIRS: Final = (
    "images/train2014",
    "images/mscoco/images/train2014",
    "images/trainval2014",
    "train2014",
    "trainval2014",
)
_VAL_DIRS: Final = (
    "images/val2014",
    "images/mscoco/images/val2014",
    "images/trainval2014",
    "val2014",
    "trainval2014",
)
_MAX_EXAMPLES: Final = 5


class ImageRoots:
    """The image folders under one data root, searched in a fixed order.

    Folders are listed once, on first need, because one listing of 80,000 names costs less than asking the
    file system for each image. Images that arrive later are seen by a new object only.
    """

    def __init__(self, data_root: Path) -> None:
        self.data_root = data_root
        self._names: dict[Path, frozenset[str]] = {}

    def directories_for(self, file_name: str) -> tuple[Path, ...]:
        """Folders where this image may lie, first match wins; `COCO_val2014_…` names have their own."""
        names = _VAL_DIRS if file_name.startswith("COCO_val2014_") else _TRAIN_DIRS
        return tuple(self.data_root / name for name in names)

    def path_of(self, file_name: str) -> Path | None:
        """Where the image lies, or None if no folder has it.

        Raises:
            DataError: the name is a path, which could lead out of the data root, or a folder cannot be read.
        """
        if file_name in ("", ".", "..") or any(character in file_name for character in "/\\\0"):
            raise DataError(
                f"The image file name {file_name!r} is not a plain name. Correct `file_name` in the "
                "annotation file.",
                file_name=file_name,
            )
        for directory in self.directories_for(file_name):
            if file_name in self._names_in(directory):
                return directory / file_name
        return None

    def resolve(self, images: Iterable[ImageRecord]) -> dict[int, Path]:
        """Find every image, or say in one error which are missing.

        Returns:
            The path of each image, by image_id, in the order given.
        Raises:
            DataError: images are missing, or as `path_of`.
        """
        found: dict[int, Path] = {}
        missing: list[str] = []
        searched: dict[Path, None] = {}
        for image in images:
            path = self.path_of(image.file_name)
            if path is None:
                missing.append(image.file_name)
                searched.update(dict.fromkeys(self.directories_for(image.file_name)))
            else:
                found[image.image_id] = path
        if missing:
            raise self._missing(missing, len(found), tuple(searched))
        return found

    def _missing(self, missing: list[str], num_found: int, searched: tuple[Path, ...]) -> DataError:
        examples = tuple(missing[:_MAX_EXAMPLES])
        places = ", ".join(
            f"{directory} ({'no match' if directory.is_dir() else 'no such folder'})"
            for directory in searched
        )
        return DataError(
            f"{len(missing)} of {len(missing) + num_found} images are missing, for example "
            f"{', '.join(examples)}. Searched: {places}. Unpack COCO's train2014.zip (val2014.zip for "
            f"COCO_val2014_ names) into {self.data_root / 'images'}, or point the data root at the folder "
            "that holds the images.",
            num_missing=len(missing),
            examples=examples,
            directories=searched,
        )

    def _names_in(self, directory: Path) -> frozenset[str]:
        names = self._names.get(directory)
        if names is None:
            names = self._names[directory] = _list_files(directory)
        return names


def _list_files(directory: Path) -> frozenset[str]:
    try:
        with os.scandir(directory) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        raise DataError(
            f"Cannot list the image folder {directory}: {error.strerror or error}.", directory=directory
        ) from error
