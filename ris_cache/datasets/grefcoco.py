"""Load gRefCOCO, whose expressions refer to one object, to several, or to nothing.

`<root>/grefcoco/grefs(unc).json` holds the refs (`grefs(unc).p` in older copies), `instances.json` beside it
the images and objects of all splits. Refs are those of RefCOCO but for `ann_id` and `category_id`, which are
lists, exactly [-1] where the expression refers to nothing, and `no_target`, which must agree with them.

Ids are not stable across versions of the file: the release of 2023-08-29 renumbered some ref_id and sent_id,
and added testA and testB. Whoever keeps results by sent_id keeps the digest of the file with them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from ris_cache.datasets.fields import Record
from ris_cache.datasets.records import ReferringDataset
from ris_cache.datasets.refs import Layout, StatedTargets, Tally, load_published

_NO_TARGET: Final = -1
_LAYOUT: Final = Layout(
    folders=("grefcoco",),
    refs_names=("grefs(unc).json", "grefs(unc).p"),
    remedy="Download gRefCOCO's files into {folder}.",
)


def load_grefcoco(root: Path, *, drop_degenerate: bool = False) -> ReferringDataset:
    """Read and check gRefCOCO.

    Args:
        root: the folder that holds the folder grefcoco.
        drop_degenerate: leave out the refs of which nothing can be drawn.
    Returns:
        All splits that the file has; a file from before 2023-08-29 lacks testA and testB.
    Raises:
        DataError, UnsafePickleError: as `refs.load_published`; also a ref that mixes -1 with real ids, or
            whose `no_target` contradicts its `ann_id`.
    """
    dataset = load_published(
        root, _LAYOUT, _read_targets, name="grefcoco", split_by="unc", drop_degenerate=drop_degenerate
    )
    # By a public audit the published val split has none; then its gIoU is not comparable with that of testA.
    singles = [e.sent_id for e in dataset.expressions if e.split == "val" and e.target_kind == "one"]
    if not singles:
        return dataset
    warning = (
        f"Expressions of val with one target, which the published file is said to lack: {len(singles)} "
        f"(first sent_id: {singles[0]})."
    )
    return replace(dataset, warnings=(*dataset.warnings, warning))


def _read_targets(ref: Record, tally: Tally) -> StatedTargets:
    ann_ids = ref.ids("ann_id")
    if not ann_ids:
        raise ref.error("ann_id", "should be [-1] for no target, not []", found=[])
    is_no_target = set(ann_ids) == {_NO_TARGET}
    if _NO_TARGET in ann_ids and not is_no_target:
        raise ref.error("ann_id", f"mixes -1, no target, with ids: {ann_ids!r:.80}", found=ann_ids)
    if "no_target" not in ref.fields:
        tally.add("Refs without the field no_target, judged by ann_id", "ref_id", ref.get("ref_id", int))
    elif ref.get("no_target", bool) is not is_no_target:
        raise ref.error(
            "no_target",
            f"is {not is_no_target}, which contradicts ann_id {list(ann_ids)!r:.80}",
            expected=is_no_target,
            found=not is_no_target,
        )
    category_ids = frozenset(ref.ids("category_id")) if "category_id" in ref.fields else None
    if is_no_target:
        category_ids = category_ids and category_ids - {_NO_TARGET}
    return StatedTargets(ann_ids=() if is_no_target else ann_ids, category_ids=category_ids)
