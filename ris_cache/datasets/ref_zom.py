"""Load Ref-ZOM, whose expressions refer to one object, to several, or to nothing (zero, one, many).

The refs lie in a folder `ref-zom` or `refzom` under one of three names, `instances.json` beside them, images
in both train2014 and val2014. Refs are those of RefCOCO with a `source`, which alone says whether there is a
target: DMMI and GSVA ignore the `ann_id` of a ref whose source is zero. There is no -1 for "no target".
`category_id` and `sent_ids` may be absent, and are only compared with what the annotations and sentences say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ris_cache.datasets.fields import Record
from ris_cache.datasets.records import ReferringDataset
from ris_cache.datasets.refs import Layout, StatedTargets, Tally, load_published

_LAYOUT: Final = Layout(
    folders=("ref-zom", "refzom"),
    refs_names=("refs(final).p", "Ref-ZOM(final).p", "Ref_ZOM.p"),
    remedy="Download Ref-ZOM's files into {folder}.",
)


def load_ref_zom(root: Path, *, drop_degenerate: bool = False) -> ReferringDataset:
    """Read and check Ref-ZOM.

    Args:
        root: the folder that holds the folder ref-zom.
        drop_degenerate: leave out the refs of which nothing can be drawn.
    Returns:
        Its splits, train and test.
    Raises:
        DataError, UnsafePickleError: as `refs.load_published`.
    """
    return load_published(
        root, _LAYOUT, _read_targets, name="ref-zom", split_by="final", drop_degenerate=drop_degenerate
    )


def _read_targets(ref: Record, tally: Tally) -> StatedTargets:
    ref_id, source = ref.get("ref_id", int), ref.get("source", str)
    if source == "zero":
        if ref.fields.get("ann_id") not in (None, []):
            tally.add("Refs of source zero that have an ann_id, taken as no target", "ref_id", ref_id)
        return StatedTargets(ann_ids=())
    ann_ids = ref.ids("ann_id")
    if not ann_ids:
        tally.add(f"Refs of source {source!r:.40} without ann_id, taken as no target", "ref_id", ref_id)
    elif (source == "one") is (len(set(ann_ids)) > 1) or source not in ("one", "many"):
        tally.add(f"Refs of source {source!r:.40} with {_counted(ann_ids)}", "ref_id", ref_id)
    return StatedTargets(ann_ids=ann_ids, category_ids=_category_ids(ref, tally) if ann_ids else None)


def _category_ids(ref: Record, tally: Tally) -> frozenset[int] | None:
    """Return what can be compared with the annotations; the form of this field is not documented."""
    value: Any = ref.fields.get("category_id")
    found: list[Any] = value if isinstance(value, list) else [value]
    if all(type(item) is int for item in found):
        return frozenset(found)
    what = "Refs without category_id" if value is None else "Refs whose category_id is not understood"
    tally.add(what, "ref_id", ref.get("ref_id", int))
    return None


def _counted(ann_ids: tuple[int, ...]) -> str:
    return "one target" if len(set(ann_ids)) == 1 else "several targets"
