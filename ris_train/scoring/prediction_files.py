"""Reading saved predictions of any method, as files of strangers: nothing is executed, resized or guessed.

The forms are those of `ris_train.scoring.predictions`. H, W: original frame.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypeVar

import numpy as np
from PIL import Image

from ris_cache.datasets.fields import is_storable, json_problem
from ris_cache.datasets.segmentation import parse_segmentation, rasterise
from ris_cache.errors import ConfigError, DataError
from ris_train.scoring.predictions import MASK_NAMES, ORIGINAL, Mask, Prediction, SampleId, wrong_size

MAX_JSON_BYTES: Final = 2 << 30
_MAX_NPY_HEADER: Final = 1 << 14
"""More bytes than the header of a mask takes."""
_NPY_HEADER: Final = re.compile(
    r"\{\s*'descr':\s*'[<>=|]?(?P<kind>[A-Za-z])\d*',\s*'fortran_order':\s*(?:True|False),"
    r"\s*'shape':\s*\((?P<shape>[0-9, ]{0,60})\),?\s*\}\s*"
)
_MAX_ITEM_BYTES: Final = 8
_NAME: Final = re.compile(r"(-?[0-9]{1,19})_(-?[0-9]{1,19})")
_PNG_MODES: Final = ("1", "L", "P", "I", "I;16", "RGB")


T = TypeVar("T")


class PredictionFile(Protocol):
    """Saved predictions; each is read when it is asked for.

    Attributes:
        info: what the file says of itself; empty if nothing.
        sample_ids: the samples that it has a prediction of.
        duplicates: those that it has more than one of.
        strays: names of entries that belong to no sample whatever.
    """

    @property
    def path(self) -> Path: ...
    @property
    def info(self) -> Mapping[str, Any]: ...
    @property
    def sample_ids(self) -> frozenset[SampleId]: ...
    @property
    def duplicates(self) -> tuple[SampleId, ...]: ...
    @property
    def strays(self) -> tuple[str, ...]: ...

    def read(self, sample_id: SampleId, grids: Mapping[str, tuple[int, int]]) -> Prediction:
        """Read one prediction.

        Args:
            sample_id: one of `sample_ids`.
            grids: (h, w) of each mask wanted, by name, with `original`; others come if they are there.

        Raises:
            WrongSizeError: a mask does not fit its grid.
            DataError: an entry that is malformed.
        """
        ...


def open_predictions(path: Path) -> PredictionFile:
    """Open saved predictions by what they are: a folder, `.json` or `.npz`.

    Raises:
        ConfigError: another suffix.
        DataError: nothing there, unreadable, too large, or not what its name says.
    """
    try:
        return _open(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.", path=path) from error


def _open(path: Path) -> PredictionFile:
    if path.is_dir():
        return PngPredictions(path)
    if not path.is_file():
        raise DataError(
            f"There are no predictions at {path}. Name a .json or .npz file, or a folder of PNGs.", path=path
        )
    if path.suffix == ".json":
        return JsonPredictions(path)
    if path.suffix == ".npz":
        return NpzPredictions(path)
    raise ConfigError(f"{path} is neither .json nor .npz nor a folder of PNGs.", path=path)


@dataclass(frozen=True, slots=True)
class _Names:
    """Entries of a folder or archive by the sample that their names state."""

    by_sample: dict[SampleId, str]
    duplicates: tuple[SampleId, ...]
    strays: tuple[str, ...]

    @classmethod
    def of(cls, stems: Mapping[str, str]) -> _Names:
        """Sort entries.

        Args:
            stems: name without suffix, by whole name.
        """
        by_sample: dict[SampleId, str] = {}
        duplicates: list[SampleId] = []
        strays: list[str] = []
        for name, stem in stems.items():
            match = _NAME.fullmatch(stem)
            if match is None:
                strays.append(name)
                continue
            sample_id = (int(match[1]), int(match[2]))
            if sample_id in by_sample:
                duplicates.append(sample_id)
            by_sample.setdefault(sample_id, name)
        return cls(by_sample, tuple(dict.fromkeys(duplicates)), tuple(strays))


class JsonPredictions:
    """COCO-style JSON with run-length encoded masks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info, entries = _load_json(path)
        self._entries: dict[SampleId, dict[str, Any]] = {}
        duplicates: list[SampleId] = []
        for index, entry in enumerate(entries):
            sample_id = self._sample_id(index, entry)
            if sample_id in self._entries:
                duplicates.append(sample_id)
            self._entries.setdefault(sample_id, entry)
        self.sample_ids = frozenset(self._entries)
        self.duplicates = tuple(dict.fromkeys(duplicates))
        self.strays: tuple[str, ...] = ()

    def read(self, sample_id: SampleId, grids: Mapping[str, tuple[int, int]]) -> Prediction:
        """See `PredictionFile.read`."""
        entry = self._entries[sample_id]
        where = f"the prediction ref_id {sample_id[0]}, sent_id {sample_id[1]}"
        if "segmentation" not in entry:
            raise self._malformed(f"{where} has no segmentation")
        others = entry.get("masks", {})
        known = [name for name in MASK_NAMES if name != ORIGINAL]
        if not isinstance(others, dict) or not set(others) <= set(known):
            raise self._malformed(f"{where} has other masks than {', '.join(known)}")
        no_target, image_id = entry.get("no_target"), entry.get("image_id")
        if no_target is not None and not isinstance(no_target, bool):
            raise self._malformed(f"{where} has a no_target that is neither true nor false")
        if image_id is not None and type(image_id) is not int:
            raise self._malformed(f"{where} has an image_id that is no whole number")
        rles = {ORIGINAL: entry["segmentation"], **others}
        masks = {
            name: self._decode(rles[name], size, name, where) for name, size in grids.items() if name in rles
        }
        return Prediction(masks=masks, no_target=no_target, image_id=image_id)

    def _decode(self, rle: object, size: tuple[int, int], name: str, where: str) -> Mask:
        if not isinstance(rle, dict):
            raise self._malformed(f"{where} has a mask {name} that is no RLE object {{size, counts}}")
        if rle.get("size") != list(size):
            raise wrong_size(name, rle.get("size"), size)
        try:
            return rasterise(parse_segmentation(rle, size), frame_size=size, grid_size=size)
        except DataError as error:
            raise self._malformed(f"{where}, mask {name}: {str(error).rstrip('.')}") from error

    def _sample_id(self, index: int, entry: object) -> SampleId:
        if not isinstance(entry, dict):
            raise self._malformed(f"entry {index} is no object")
        values = entry.get("ref_id"), entry.get("sent_id")
        if not all(type(value) is int and is_storable(value) for value in values):
            raise self._malformed(f"entry {index} lacks ref_id or sent_id, whole numbers of 64 bits")
        return values  # type: ignore[return-value]

    def _malformed(self, problem: str) -> DataError:
        return DataError(f"{self.path}: {problem}. `ris score --help` describes the form.", path=self.path)


class PngPredictions:
    """A folder of PNGs; whatever else lies in it counts as stray."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: Mapping[str, Any] = {}
        files = sorted(item for item in path.iterdir() if not item.name.startswith("."))
        # Only regular files: a pipe of such a name would be waited for without end.
        stems = {
            item.name: item.stem if item.suffix.lower() == ".png" and item.is_file() else item.name + "?"
            for item in files
        }
        self._names = _Names.of(stems)
        self.sample_ids = frozenset(self._names.by_sample)
        self.duplicates = self._names.duplicates
        self.strays = self._names.strays

    def read(self, sample_id: SampleId, grids: Mapping[str, tuple[int, int]]) -> Prediction:
        """See `PredictionFile.read`."""
        path = self.path / self._names.by_sample[sample_id]
        expected = grids[ORIGINAL]
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if (image.height, image.width) != expected:  # the header says so: nothing is decoded
                    raise wrong_size(path.name, (image.height, image.width), expected)
                if image.mode not in _PNG_MODES:
                    raise DataError(
                        f"{path} has a transparent layer (mode {image.mode}): its foreground cannot be told. "
                        "Save masks as greyscale PNGs, 0 and 255.",
                        path=path,
                        mode=image.mode,
                    )
                # A palette's indices are taken, not its colours.
                pixels = np.asarray(image)
        except DataError:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, zlib.error) as error:
            raise DataError(f"{path} cannot be read as PNG: {error}.", path=path) from error
        except MemoryError as error:
            raise DataError(f"{path} cannot be read as PNG: a chunk claims gigabytes.", path=path) from error
        mask = pixels != 0
        return Prediction(masks={ORIGINAL: mask.any(axis=2) if mask.ndim == 3 else mask})


class NpzPredictions:
    """An archive of arrays, each read when asked for; object arrays, which would be pickles, are refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: Mapping[str, Any] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise DataError(f"{path} cannot be read as NPZ: {error}.", path=path) from error
        names = [info.filename for info in infos]
        self._sizes = {info.filename: info.file_size for info in infos}
        suffix = "_no_target.npy"
        self._flags = frozenset(name for name in names if name.endswith(suffix))
        stems = {name: name.removesuffix(".npy") for name in dict.fromkeys(names) if name not in self._flags}
        self._names = _Names.of(stems)
        times = Counter(names)
        repeated = _Names.of({name: stem for name, stem in stems.items() if times[name] > 1})
        self.duplicates = (*self._names.duplicates, *repeated.by_sample)
        masked = {name.removesuffix(".npy") + suffix for name in self._names.by_sample.values()}
        self.sample_ids = frozenset(self._names.by_sample)
        self.strays = (*self._names.strays, *sorted(self._flags - masked))
        self._archive: zipfile.ZipFile | None = None

    def read(self, sample_id: SampleId, grids: Mapping[str, tuple[int, int]]) -> Prediction:
        """See `PredictionFile.read`."""
        name = self._names.by_sample[sample_id]
        expected = grids[ORIGINAL]
        limit = expected[0] * expected[1] * _MAX_ITEM_BYTES + _MAX_NPY_HEADER
        shape = self._shape(name)
        if shape != expected:
            raise wrong_size(name, shape, expected)
        if self._sizes[name] > limit:
            raise self._malformed(name, "holds more than its shape says")
        flag_name = name.removesuffix(".npy") + "_no_target.npy"
        no_target = None
        if flag_name in self._flags:
            if (shape := self._shape(flag_name)) not in ((), (1,)):
                raise self._malformed(flag_name, f"is of shape {shape}, not one value")
            no_target = bool(self._mask(flag_name).reshape(()))
        return Prediction(masks={ORIGINAL: self._mask(name)}, no_target=no_target)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape that the header states, before memory is taken for it.

        numpy evaluates a header as Python source, and takes memory for items as large as it states; so it is
        given those alone that numpy itself writes for an array of numbers.
        """

        def header_of(member: IO[bytes]) -> bytes:
            version = np.lib.format.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"version {version} of the format")
            num_bytes = int.from_bytes(member.read(2 if version == (1, 0) else 4), "little")
            return member.read(min(num_bytes, _MAX_NPY_HEADER))

        header = _NPY_HEADER.fullmatch(self._read(name, header_of).decode("latin1"))
        if header is None:
            raise self._malformed(name, "has another header than numpy gives an array of numbers")
        if header["kind"] not in "biuf":
            raise self._malformed(name, f"holds other values than 0 and 1 (type {header['kind']})")
        return tuple(int(side) for side in header["shape"].replace(" ", "").split(",") if side)

    def _mask(self, name: str) -> Mask:
        array = self._read(name, lambda member: np.lib.format.read_array(member, allow_pickle=False))
        if array.dtype == np.bool_:
            mask: Mask = array
            return mask
        if not np.isin(array, (0, 1)).all():
            raise self._malformed(name, f"holds other values than 0 and 1 ({array.dtype})")
        return np.asarray(array == 1)

    def _read(self, name: str, read: Callable[[IO[bytes]], T]) -> T:
        try:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self.path)
            method = self._archive.getinfo(name).compress_type
            if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise NotImplementedError(f"compressed by method {method}, which numpy never does")
            with self._archive.open(name) as member:
                return read(member)
        except (
            OSError,
            ValueError,
            EOFError,
            RuntimeError,
            NotImplementedError,
            zipfile.BadZipFile,
        ) as error:
            raise self._malformed(name, f"cannot be read: {error}") from error
        except zlib.error as error:
            raise self._malformed(name, f"is damaged: {error}") from error

    def _malformed(self, name: str, problem: str) -> DataError:
        return DataError(
            f"{self.path}: {name} {problem}. `ris score --help` describes the form.", path=self.path
        )


def _load_json(path: Path) -> tuple[dict[str, Any], list[Any]]:
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise DataError(
            f"{path} has {num_bytes} bytes; JSON is read up to {MAX_JSON_BYTES}. Save each split by itself.",
            path=path,
            found=num_bytes,
            expected=MAX_JSON_BYTES,
        )
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"{path} is not JSON: {json_problem(error)}.", path=path) from error
    info: object = {}
    if isinstance(document, dict):
        info, document = document.get("info", {}), document.get("predictions")
    if not isinstance(document, list) or not isinstance(info, dict):
        raise DataError(
            f"{path} holds neither a list of predictions nor an object with one under `predictions`.",
            path=path,
        )
    return info, document
