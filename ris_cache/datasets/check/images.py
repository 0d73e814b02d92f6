"""Look for image files and compare the size in their headers with the annotated one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ris_cache.datasets.check.report import ImageFindings
from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.pictures import frame_size
from ris_cache.datasets.records import ImageRecord
from ris_cache.errors import DataError

Headers = dict[Path, tuple[int, int] | str]
"""(H, W) by path, or why it could not be read; datasets share images, and each is read once."""

_MAX_EXAMPLES = 5
_READERS = 8  # a header is one small read: a disk that is far away is asked for several at a time


def check_images(
    images: Sequence[ImageRecord],
    roots: ImageRoots,
    headers: Headers,
    advance: Callable[[int, int], None],
) -> ImageFindings:
    """Find every image and read its header.

    Args:
        headers: read before; the new ones are added.
        advance: called with the headers read so far and how many there are to read.
    Raises:
        DataError: a file name that is a path, or a folder that cannot be listed.
    """
    paths = {image.image_id: roots.path_of(image.file_name) for image in images}
    wanted = list(dict.fromkeys(path for path in paths.values() if path is not None and path not in headers))
    with ThreadPoolExecutor(_READERS) as pool:
        for done, (found, read) in enumerate(zip(wanted, pool.map(_header, wanted), strict=True), start=1):
            headers[found] = read
            advance(done, len(wanted))
    missing: list[str] = []
    other_size: list[str] = []
    unreadable: list[str] = []
    searched: dict[str, bool] = {}
    for image in images:
        path, annotated = paths[image.image_id], (image.height, image.width)
        header = None if path is None else headers[path]
        if header is None:
            missing.append(image.file_name)
            searched |= {str(folder): folder.is_dir() for folder in roots.directories_for(image.file_name)}
        elif isinstance(header, str):
            unreadable.append(header)
        elif header != annotated:
            other_size.append(
                f"{path} is {header[0]}x{header[1]} (height x width), annotated as "
                f"{annotated[0]}x{annotated[1]}"
            )
    return ImageFindings(
        num_images=len(images),
        missing=len(missing),
        missing_examples=tuple(missing[:_MAX_EXAMPLES]),
        searched=searched,
        other_size=len(other_size),
        other_size_examples=tuple(other_size[:_MAX_EXAMPLES]),
        unreadable=len(unreadable),
        unreadable_examples=tuple(unreadable[:_MAX_EXAMPLES]),
    )


def _header(path: Path) -> tuple[int, int] | str:
    try:
        return frame_size(path)
    except DataError as error:
        return str(error)
