"""Which datasets lie below a data root."""

from __future__ import annotations

from pathlib import Path

from ris_cache.datasets.selection import CUSTOM, PUBLISHED_DATASETS, Selection
from ris_cache.errors import DataError

_REF_ZOM_NAMES = ("refs(final).p", "Ref-ZOM(final).p", "Ref_ZOM.p")


def refs_paths(root: Path, selection: Selection) -> tuple[Path, ...]:
    """Return where the loader looks for the file of expressions; of several, it reads the first there is."""
    if selection.dataset == CUSTOM:
        return (root / CUSTOM / f"{selection.split_by}.jsonl",)
    if selection.dataset == "grefcoco":
        return (root / "grefcoco" / "grefs(unc).json", root / "grefcoco" / "grefs(unc).p")
    if selection.dataset == "ref-zom":
        return tuple(root / folder / name for folder in ("ref-zom", "refzom") for name in _REF_ZOM_NAMES)
    return (root / selection.dataset / f"refs({selection.split_by}).p",)


def refs_path(root: Path, selection: Selection) -> Path | None:
    """Return the file of expressions that the loader reads, or None if there is none."""
    return next((path for path in refs_paths(root, selection) if path.is_file()), None)


def find_datasets(root: Path) -> tuple[Selection, ...]:
    """Find every dataset of every split_by below a data root.

    A folder of a published dataset without any of its files counts as the dataset of the default split_by, so
    that loading it says what is wrong with it.

    Returns:
        In the order of `PUBLISHED_DATASETS`, custom datasets last, by name.
    Raises:
        DataError: there is none.
    """
    found: list[Selection] = []
    for dataset, split_bys in PUBLISHED_DATASETS.items():
        known = [Selection(dataset=dataset, split_by=split_by) for split_by in split_bys]
        present = [selection for selection in known if refs_path(root, selection) is not None]
        folders = {path.parent for path in refs_paths(root, known[0])}
        if not present and any(folder.is_dir() for folder in folders):
            present = known[:1]
        found += present
    found += [
        Selection(dataset=CUSTOM, split_by=path.stem)
        for path in sorted((root / CUSTOM).glob("*.jsonl"))
        if path.is_file()
    ]
    if not found:
        raise _nothing(root)
    return tuple(found)


def _nothing(root: Path) -> DataError:
    folders = (*(f"{dataset}/" for dataset in PUBLISHED_DATASETS), f"{CUSTOM}/*.jsonl")
    here = sorted(path.name for pattern in ("*refs(*).*", "instances.json") for path in root.glob(pattern))
    if here:
        remedy = f"{here[0]} lies in {root} itself; name the folder that holds {root.resolve().name}/."
    elif not root.is_dir():
        remedy = "There is no such folder; name the data root with --data."
    else:
        remedy = "Put the files there as docs/datasets.md says, or draw a dataset with `ris data synth`."
    return DataError(
        f"No dataset lies below {root}: none of {', '.join(folders)}. {remedy}", path=root, expected=folders
    )
