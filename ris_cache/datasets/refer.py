"""Load RefCOCO, RefCOCO+ and RefCOCOg as their authors published them.

`<root>/<name>/refs(<split_by>).p` holds the refs, `<root>/<name>/instances.json` the images and objects of
all splits together.
"""

from __future__ import annotations

from pathlib import Path

from ris_cache.datasets.fields import Record
from ris_cache.datasets.records import ReferringDataset
from ris_cache.datasets.refs import Layout, StatedTargets, Tally, load_published
from ris_cache.errors import ConfigError


def load_refer(root: Path, name: str, split_by: str, *, drop_degenerate: bool = False) -> ReferringDataset:
    """Read and check one dataset of one split_by.

    Args:
        root: the folder that holds the dataset folders.
        name: refcoco, refcoco+ or refcocog; the name of the dataset folder.
        split_by: unc, google or umd; the part of the refs file's name in parentheses.
        drop_degenerate: leave out the refs of which nothing can be drawn.
    Returns:
        All splits, as `refs.load_published` gives them.
    Raises:
        ConfigError: `name` or `split_by` is a path.
        DataError, UnsafePickleError: as `refs.load_published`.
    """
    for argument in (name, split_by):
        if argument in ("", ".", "..") or "/" in argument or "\\" in argument:
            raise ConfigError(f"{argument!r} is not the name of a dataset or a split_by.", found=argument)
    layout = Layout(
        folders=(name,),
        refs_names=(f"refs({split_by}).p",),
        remedy="Unpack " + name + ".zip in {root}, so that {folder} holds its files.",
    )
    return load_published(
        root, layout, _read_targets, name=name, split_by=split_by, drop_degenerate=drop_degenerate
    )


def _read_targets(ref: Record, tally: Tally) -> StatedTargets:
    ann_ids = ref.ids("ann_id")
    if not ann_ids:
        raise ref.error("ann_id", "should be an id or a list of ids, not []", found=[])
    category_ids = frozenset(ref.ids("category_id")) if "category_id" in ref.fields else None
    return StatedTargets(ann_ids=ann_ids, category_ids=category_ids)
