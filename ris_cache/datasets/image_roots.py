"""Find images on disk: COCO's, whichever of the usual folder conventions the copy follows, and custom ones.

A custom dataset's images have names that are paths, `custom/birds/1.jpg`, and lie just there below the data
root. All other names are plain. No name leads out of its folder.
"""

from __future__ import annotations

import os
import stat
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
_CUSTOM_DIR: Final = "custom"
_MAX_EXAMPLES: Final = 5


class ImageRoots:
    """The image folders under one data root, searched in a fixed order.

    COCO's folders are listed once, on first need, because one listing of 80,000 names costs less than asking
    the file system for each image. Images that arrive later are seen by a new object only.
    """

    def __init__(self, data_root: Path) -> None:
        self.data_root = data_root
        self._names: dict[Path, frozenset[str]] = {}
        self._custom_folders: dict[Path, bool] = {}

    def directories_for(self, file_name: str) -> tuple[Path, ...]:
        """Folders where this image may lie, first match wins; `COCO_val2014_…` names have their own."""
        if _is_custom(file_name):
            return (self.data_root / _CUSTOM_DIR,)
        names = _VAL_DIRS if file_name.startswith("COCO_val2014_") else _TRAIN_DIRS
        return tuple(self.data_root / name for name in names)

    def path_of(self, file_name: str) -> Path | None:
        """Where the image lies, or None if no folder has it.

        Raises:
            DataError: the name is a path, which could lead out of the data root, or a custom image's leads
                out of the custom folder; or a folder cannot be read.
        """
        if _is_custom(file_name):
            path = self.custom_path(file_name.removeprefix(f"{_CUSTOM_DIR}/"))
            return path if path.is_file() else None
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

    def custom_path(self, relative: str) -> Path:
        """Return the path of a custom dataset's image or mask, which need not be there.

        Args:
            relative: to `<data_root>/custom`, with forward slashes.
        Raises:
            DataError: it is no plain relative path, or it leads out of the folder, be it by a symbolic link.
        """
        folder = self.data_root / _CUSTOM_DIR
        path = folder / relative
        is_plain = not any(part in ("", ".", "..") for part in relative.split("/")) and "\\" not in relative
        try:
            is_inside = is_plain and self._stays_inside(path)
        except (OSError, RuntimeError, ValueError) as error:
            # A loop of links, a folder that may not be entered, or a name that the file system cannot hold.
            raise DataError(
                f"The path {relative!r:.200} cannot be followed: {error}.", path=relative
            ) from error
        if not is_inside:
            raise DataError(
                f"The path {relative!r:.200} is not one below {folder}. Write it relative to that folder, "
                "with forward slashes and without `.` or `..`, and put the file there, not a link to "
                "elsewhere.",
                path=relative,
                directory=folder,
            )
        return path

    def _stays_inside(self, path: Path) -> bool:
        """Whether links lead nowhere else; each folder is followed once, since that is slow."""
        is_inside = self._custom_folders.get(path.parent)
        if is_inside is None:
            is_inside = self._custom_folders[path.parent] = self._resolves_inside(path.parent)
        if not is_inside:
            return False
        try:
            is_link = stat.S_ISLNK(path.lstat().st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return not is_link or self._resolves_inside(path)

    def _resolves_inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to((self.data_root / _CUSTOM_DIR).resolve())

    def resolve(self, images: Iterable[ImageRecord]) -> dict[int, Path]:
        """Find every image, or say in one error which are missing.

        Returns:
            The path of each image, by image_id, in the order given.
        Raises:
            DataError: images are missing, or as `path_of`.
        """
        images = tuple(images)
        paths = self.find_all(image.file_name for image in images)
        return {image.image_id: paths[image.file_name] for image in images}

    def find_all(self, file_names: Iterable[str]) -> dict[str, Path]:
        """Find every image by its name, or say in one error which are missing.

        Raises:
            DataError: images are missing, or as `path_of`.
        """
        found: dict[str, Path] = {}
        missing: list[str] = []
        searched: dict[Path, None] = {}
        for file_name in dict.fromkeys(file_names):
            path = self.path_of(file_name)
            if path is None:
                missing.append(file_name)
                searched.update(dict.fromkeys(self.directories_for(file_name)))
            else:
                found[file_name] = path
        if missing:
            raise self._missing(missing, len(found), tuple(searched))
        return found

    def _missing(self, missing: list[str], num_found: int, searched: tuple[Path, ...]) -> DataError:
        examples = tuple(missing[:_MAX_EXAMPLES])
        are_custom = all(_is_custom(name) for name in missing)
        remedy = (
            "Put them where the dataset's file says."
            if are_custom
            else "Unpack COCO's train2014.zip (val2014.zip for COCO_val2014_ names) into "
            f"{self.data_root / 'images'}, or point the data root at the folder that holds the images."
        )
        places = ", ".join(
            f"{directory} ({'no match' if directory.is_dir() else 'no such folder'})"
            for directory in searched
        )
        return DataError(
            f"{len(missing)} of {len(missing) + num_found} images are missing, for example "
            f"{', '.join(examples)}. Searched: {places}. {remedy}",
            num_missing=len(missing),
            examples=examples,
            directories=searched,
        )

    def _names_in(self, directory: Path) -> frozenset[str]:
        names = self._names.get(directory)
        if names is None:
            names = self._names[directory] = _list_files(directory)
        return names


def _is_custom(file_name: str) -> bool:
    return file_name.startswith(f"{_CUSTOM_DIR}/")


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
