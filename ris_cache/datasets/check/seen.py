"""What the files turned out to hold where what is publicly said of them is unsure.

Ids are not stable across versions of a file, so its digest is the first thing to know. gRefCOCO's and
Ref-ZOM's files are read again here, as plain values: what the loader makes of them no longer shows which
form a field had.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from ris_cache.datasets import safe_pickle
from ris_cache.datasets.fields import read_json
from ris_cache.datasets.records import ImageRecord, ReferringDataset
from ris_cache.datasets.selection import CUSTOM
from ris_cache.store.files import sha256_file

Words = frozenset[tuple[int, str]]
"""(image_id, cleaned sentence) of some expressions."""

_FIRST: Final = (0, 581857, (1719310,), "THE LADY WITH THE BLUE SHIRT")
_MAX_VALUES: Final = 20


def seen_in_files(path: Path, dataset: ReferringDataset) -> dict[str, Any]:
    """Describe one dataset's file of expressions.

    Args:
        path: what `dataset` was loaded from.
    Returns:
        Counts, names and digests, by what they are.
    """
    digest = sha256_file(path)
    seen: dict[str, Any] = {"file": str(path), "bytes": digest.num_bytes, "SHA-256": digest.sha256}
    if dataset.name == CUSTOM:
        return seen
    if path.suffix == ".p":
        seen["pickle protocol"] = _protocol(path)
        seen["pickle of plain values only"] = True  # or it would not have been loaded
    if (dataset.name, dataset.split_by) == ("refcoco", "unc"):
        first = dataset.expressions[0]
        found = (first.ref_id, first.image_id, first.ann_ids, first.raw)
        seen["first ref is the one that its authors' documentation shows"] = found == _FIRST
    if dataset.name not in ("grefcoco", "ref-zom"):
        return seen
    refs: Any = safe_pickle.load(path) if path.suffix == ".p" else read_json(path)
    seen["refs"] = len(refs)
    seen["refs with each field"] = _tallied((name for ref in refs for name in ref), show=str)
    seen["refs by form of ann_id"] = dict(Counter(_form(ref.get("ann_id")) for ref in refs))
    return seen | (_grefcoco(refs, dataset) if dataset.name == "grefcoco" else _ref_zom(refs, dataset))


def train_words(dataset: ReferringDataset) -> Words | None:
    """Collect what is needed to compare RefCOCO's training expressions with gRefCOCO's of one target."""
    if (dataset.name, dataset.split_by) not in (("refcoco", "unc"), ("grefcoco", "unc")):
        return None
    return frozenset(
        (e.image_id, e.sent)
        for e in dataset.expressions
        if e.split == "train" and (dataset.name == "refcoco" or e.target_kind == "one")
    )


def compare_singles(refcoco: Words, grefcoco: Words) -> dict[str, int]:
    """Compare gRefCOCO's training expressions of one target with RefCOCO's, of which they seem to consist."""
    return {
        "different single-target expressions (image, words) of train": len(grefcoco),
        "of them in RefCOCO's train (unc)": len(grefcoco & refcoco),
        "of RefCOCO's train (unc) that are not among them": len(refcoco - grefcoco),
    }


def _grefcoco(refs: Sequence[dict[str, Any]], dataset: ReferringDataset) -> dict[str, Any]:
    val = [expression for expression in dataset.expressions if expression.split == "val"]
    return {
        "refs by no_target": _tallied(ref.get("no_target", "absent") for ref in refs),
        "sentences of val by targets": dict(Counter(expression.target_kind for expression in val)),
        "sentences with a target": sum(not e.is_no_target for e in dataset.expressions),
        "sentences without target": sum(e.is_no_target for e in dataset.expressions),
    }


def _ref_zom(refs: Sequence[dict[str, Any]], dataset: ReferringDataset) -> dict[str, Any]:
    return {
        "refs by source": _tallied(ref["source"] for ref in refs),
        "refs by form of category_id": dict(Counter(_form(ref.get("category_id")) for ref in refs)),
        "sentences by split": dict(Counter(expression.split for expression in dataset.expressions)),
        "images by folder": dict(Counter(map(_folder, dataset.images.values()))),
    }


def _folder(image: ImageRecord) -> str:
    names = ("train2014", "val2014")
    return next((name for name in names if image.file_name.startswith(f"COCO_{name}_")), "other")


def _protocol(path: Path) -> int | str:
    with path.open("rb") as file:
        start = file.read(2)
    return start[1] if start[:1] == pickle.PROTO else "0 or 1"


def _form(value: object) -> str:
    if isinstance(value, list):
        return {0: "empty list", 1: "list of one"}.get(len(value), "list of several")
    return "absent" if value is None else type(value).__name__


def _tallied(values: Iterable[object], show: Callable[[object], str] = repr) -> dict[str, int]:
    """Count values, the frequent ones by themselves."""
    counts = Counter(show(value)[:40] for value in values)
    common = dict(counts.most_common(_MAX_VALUES))
    others = counts.total() - sum(common.values())
    return common | ({"other values": others} if others else {})
