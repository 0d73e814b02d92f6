"""Saved predictions: what a method, ours or anybody's, says about every sample, and how we write it.

Three forms, matched to samples by ref_id and sent_id:

- JSON: a list of {"ref_id", "sent_id", "segmentation": RLE}, or {"predictions": [...], "info": {...}}. An RLE
  is COCO's {"size": [H, W], "counts": ...}, here in the original frame. Optional in each entry: "image_id";
  "no_target", the decision of a no-target head; "masks", {"1024": RLE, ...}: the prediction on other grids.
- A folder of PNGs `<ref_id>_<sent_id>.png` of H × W pixels; non-zero is foreground.
- NPZ with arrays `<ref_id>_<sent_id>`, bool or 0/1 of [H, W]; optional `<ref_id>_<sent_id>_no_target`.

H, W: original frame. h, w: the grid of a mask.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.fields import shown
from ris_cache.datasets.records import Rle
from ris_cache.datasets.segmentation import rasterise
from ris_cache.errors import ConfigError, DataError
from ris_cache.store.files import write_atomically
from ris_train.data.samples import Sample
from ris_train.scoring.views import VIEWS, View

Mask = npt.NDArray[np.bool_]
SampleId = tuple[int, int]
"""(ref_id, sent_id), one sample of a dataset."""

ORIGINAL: Final = "original"


def mask_name(view: View) -> str:
    """Name the predicted mask that a view compares: by its grid, and by its threshold unless that is 0.5."""
    return view.grid if view.threshold == 0.5 else f"{view.grid}-p{round(100 * view.threshold)}"


MASK_NAMES: Final = tuple(dict.fromkeys(mask_name(view) for view in VIEWS.values()))
"""Every mask that a view asks for; `original` is the one that each prediction has."""


class PredictionWriter:
    """Keeps predicted masks, run-length encoded, until they are written.

    Args:
        target: a path that ends in `.json` or `.npz`; without suffix, or ending in `/`, a folder of PNGs.

    Raises:
        ConfigError: another suffix, or a folder that holds something.
    """

    def __init__(self, target: str) -> None:
        self.path = Path(target)
        self._is_folder = target.endswith("/") or not self.path.suffix
        if not self._is_folder and self.path.suffix not in (".json", ".npz"):
            raise ConfigError(
                f"Predictions are written as .json, .npz or a folder of PNGs, not {self.path.name!r}.",
                path=self.path,
            )
        if not self._is_folder and self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder. Name another file.", path=self.path)
        if self._is_folder and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(f"{self.path} is no empty folder. Name another place.", path=self.path)
        self._masks: dict[SampleId, dict[str, Rle]] = {}

    def require_one_table(self, table_names: Sequence[str]) -> None:
        """Refuse samples of several datasets, whose ids may be the same.

        Raises:
            ConfigError: there are several.
        """
        if len(names := list(dict.fromkeys(table_names))) > 1:
            raise ConfigError(
                f"One file of predictions belongs to one dataset, not to {', '.join(names)}: ids of "
                "different datasets may be the same. Evaluate each by itself, with --split.",
                tables=names,
            )

    def keep_mask(self, sample: Sample, name: str, mask: Mask) -> None:
        """Take a predicted mask, bool[h, w]; of a mask given twice the first is kept."""
        masks = self._masks.setdefault((sample.ref_id, sample.sent_id), {})
        if name not in masks:
            masks[name] = encode(mask)

    def write(
        self,
        samples: Sequence[Sample],
        says_no_target: npt.NDArray[np.bool_],
        *,
        has_head: bool,
        info: Mapping[str, Any],
    ) -> None:
        """Write the masks of all samples.

        A folder of PNGs keeps the masks in the original frame alone, NPZ these and the decisions of a
        no-target head; JSON keeps everything.

        Args:
            samples: whose masks were given.
            says_no_target: bool[samples].
            has_head: whether `says_no_target` is a decision.
            info: what made them, plain values.
        """
        unique: dict[SampleId, tuple[Sample, bool]] = {}
        for sample, says in zip(samples, says_no_target.tolist(), strict=True):
            unique.setdefault((sample.ref_id, sample.sent_id), (sample, says))
        if self._is_folder:
            self.path.mkdir(parents=True, exist_ok=True)
            for (ref_id, sent_id), masks in self._ordered(unique):
                pixels = decode(masks[ORIGINAL]).astype(np.uint8) * 255
                Image.fromarray(pixels).save(self.path / f"{ref_id}_{sent_id}.png")
        elif self.path.suffix == ".npz":
            write_atomically(self.path, lambda file: self._write_npz(file, unique, has_head))
        else:
            write_atomically(self.path, self._json(unique, has_head, info))

    def _ordered(self, unique: Mapping[SampleId, object]) -> list[tuple[SampleId, dict[str, Rle]]]:
        return [(key, self._masks[key]) for key in unique]

    def _json(
        self, unique: Mapping[SampleId, tuple[Sample, bool]], has_head: bool, info: Mapping[str, Any]
    ) -> bytes:
        names = [name for name in MASK_NAMES if any(name in masks for masks in self._masks.values())]
        thresholds = {mask_name(view): view.threshold for view in VIEWS.values()}
        info = dict(info) | {"thresholds": {name: thresholds[name] for name in names}}
        lines = []
        for (ref_id, sent_id), masks in self._ordered(unique):
            sample, says = unique[ref_id, sent_id]
            entry: dict[str, Any] = {"ref_id": ref_id, "sent_id": sent_id, "image_id": sample.image_id}
            if has_head:
                entry["no_target"] = says
            entry["segmentation"] = _as_json(masks[ORIGINAL])
            others = {name: _as_json(rle) for name, rle in masks.items() if name != ORIGINAL}
            if others:
                entry["masks"] = others
            lines.append(json.dumps(entry, separators=(",", ":")))
        head = json.dumps(info, allow_nan=False)
        return ('{"info": ' + head + ',\n"predictions": [\n' + ",\n".join(lines) + "\n]}\n").encode()

    def _write_npz(
        self, file: BinaryIO, unique: Mapping[SampleId, tuple[Sample, bool]], has_head: bool
    ) -> None:
        # Not `np.savez`, which holds every mask in memory at once.
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for (ref_id, sent_id), masks in self._ordered(unique):
                arrays: dict[str, npt.NDArray[np.bool_]] = {f"{ref_id}_{sent_id}": decode(masks[ORIGINAL])}
                if has_head:
                    arrays[f"{ref_id}_{sent_id}_no_target"] = np.array(unique[ref_id, sent_id][1])
                for name, array in arrays.items():
                    # Of a fixed date, so that the same predictions give the same bytes.
                    entry = zipfile.ZipInfo(f"{name}.npy")
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    with archive.open(entry, "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a method says about one sample.

    Attributes:
        masks: bool[h, w] by name; `original`, in the image's own frame, is always there.
        no_target: the decision of a no-target head, None without one.
        image_id: of the image that it belongs to, None if not stated.
    """

    masks: dict[str, Mask]
    no_target: bool | None = None
    image_id: int | None = None


class WrongSizeError(DataError):
    """A predicted mask of another size than the grid it is for; `facts` has `expected` and `found`."""


def wrong_size(name: str, found: object, expected: tuple[int, int]) -> WrongSizeError:
    """Say that a mask does not fit its grid."""
    return WrongSizeError(
        f"The mask {name} is {shown(found)}, its grid {expected}. Masks are never resized unasked.",
        expected=expected,
        found=found,
    )


def encode(mask: Mask) -> Rle:
    """Run-length encode a mask bool[h, w]."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    height, width = mask.shape
    return Rle(size=(height, width), counts=encoded["counts"].decode("ascii"))


def decode(rle: Rle) -> Mask:
    """Decode what `encode` returned."""
    return rasterise(rle, frame_size=rle.size, grid_size=rle.size)


def _as_json(rle: Rle) -> dict[str, object]:
    return {"size": list(rle.size), "counts": rle.counts}
