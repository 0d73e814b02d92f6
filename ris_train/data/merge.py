"""Training sets: one split of one dataset, or several merged.

The datasets draw on one pool of images, and each cuts it into splits of its own: what one trains on, another
tests on. A merge therefore leaves out the training images on which any dataset of the cache is validated or
tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from ris_cache.datasets.leakage import leaking_images
from ris_cache.datasets.selection import Selection, matching_splits, parse_selections
from ris_cache.errors import CacheMissError, ConfigError
from ris_cache.store.cache import CategorySet, FeatureCache
from ris_train.data.samples import Samples, SampleSet, load_samples

EVALUATION_SPLITS: Final[dict[str, tuple[str, ...]]] = {
    "refcoco.unc": ("val", "testA", "testB"),
    "refcoco.google": ("val", "test"),
    "refcoco+.unc": ("val", "testA", "testB"),
    "refcocog.umd": ("val", "test"),
    "refcocog.google": ("val",),
    "grefcoco.unc": ("val", "testA", "testB"),
    "ref-zom.final": ("test",),
}
"""What each published table is validated and tested on. A custom dataset's are all splits but `train`."""

Leakage = Literal["exclude", "keep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPart:
    """What one split gives to a training set.

    Attributes:
        selection: `dataset.split_by:split`.
        expressions: that are trained on.
        images: that these are of.
        quarantined: expressions left out, since their image could not be read at extraction.
        degenerate: expressions left out, since their annotation encloses nothing.
        no_target: expressions left out, since they refer to nothing and the model has no head for that.
        leaking_images: images that are in a validation or test split as well.
        leaking_expressions: usable expressions of these images.
        shared: by such split, `dataset.split_by:split`, how many images it shares.
        is_filtered: whether expressions of leaking images were left out.
    """

    selection: str
    expressions: int
    images: int
    quarantined: int
    degenerate: int
    no_target: int
    leaking_images: int
    leaking_expressions: int
    shared: Mapping[str, int]
    is_filtered: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "selection": self.selection,
            "expressions": self.expressions,
            "images": self.images,
            "left_out": {
                "quarantined": self.quarantined,
                "degenerate": self.degenerate,
                "no_target": self.no_target,
                "leaking": self.leaking_expressions if self.is_filtered else 0,
            },
            "leaking_images": self.leaking_images,
            "leaking_expressions": self.leaking_expressions,
            "shared_with": dict(self.shared),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSet:
    """The samples that a run trains on, and how they came about; samples lie part after part."""

    samples: Samples
    parts: tuple[TrainingPart, ...]

    @property
    def table_names(self) -> tuple[str, ...]:
        """Tables of the parts, each once, in their order."""
        return tuple(dict.fromkeys(part.selection.partition(":")[0] for part in self.parts))

    @property
    def left_out(self) -> int:
        """Expressions without a usable mask or image."""
        return sum(part.quarantined + part.degenerate + part.no_target for part in self.parts)

    @property
    def left_out_for_leakage(self) -> int:
        """Expressions on images of validation or test splits that were left out."""
        return sum(part.leaking_expressions for part in self.parts if part.is_filtered)


def load_training_set(
    cache: FeatureCache,
    selection: str,
    *,
    text: str,
    leakage: Leakage,
    with_no_target: bool,
    val: str | None = None,
) -> TrainingSet:
    """Load one split, or merge several.

    One dataset is taken as it is; images that its own validation and test splits hold as well, as those of
    google do, are counted, and those that the dataset of `val` evaluates on. Of several, expressions on
    images that any validation or test split of the cache holds are left out.

    Args:
        cache: holds every dataset of the selection.
        selection: a split such as `refcoco:train`, or a comma list of splits.
        text: `raw` or `sent`.
        leakage: `keep` trains on those images all the same, and counts them.
        with_no_target: whether expressions that refer to nothing are trained on.
        val: the split that chooses the best checkpoint, if that is to be looked at.

    Raises:
        CacheMissError: the cache lacks a selection; or, of a merged dataset, a split that decides what leaks.
        ConfigError: a selection without a split, or a google split in a merge.
    """
    selections = require_splits(selection, "data.train")
    tables = {one.table_name for one in selections}
    is_merge = len(tables) > 1
    is_filtered = is_merge and leakage == "exclude"
    if is_filtered:
        _require_no_object_partition(selections)
        _require_evaluation_splits(cache, sorted(tables))
    looked_at = set(cache.manifest.datasets) if is_merge else set(tables)
    if val is not None:
        looked_at.add(require_one_split(val, "data.val").table_name)
    evaluated = evaluation_images(cache, selections, looked_at)
    samples = Samples.of(())
    parts = []
    for one in selections:
        kept, part = _kept_of(
            load_samples(cache, one, text=text),
            f"{one.table_name}:{one.split}",
            evaluated,
            with_no_target=with_no_target,
            is_filtered=is_filtered,
        )
        samples = samples + kept
        parts.append(part)
    return TrainingSet(samples=samples, parts=tuple(parts))


def _kept_of(
    loaded: SampleSet,
    name: str,
    evaluated: Mapping[str, set[int]],
    *,
    with_no_target: bool,
    is_filtered: bool,
) -> tuple[Samples, TrainingPart]:
    """Choose what a split gives to a training set.

    Args:
        loaded: the split.
        name: `dataset.split_by:split`.
        evaluated: image_ids of the splits that others are scored on, by such names.
        with_no_target: whether expressions that refer to nothing are kept.
        is_filtered: whether those on images of `evaluated` are left out.
    """
    whole = Samples.of(loaded.samples)
    meant = whole if with_no_target else whole.select(~whole.column("is_no_target"))
    usable = meant.select(~meant.column("is_degenerate"))
    leaking = list(frozenset[int]().union(*evaluated.values()))
    clean = usable.select(~np.isin(usable.column("image_id"), leaking))
    kept = clean if is_filtered else usable
    shared = leaking_images({name: set(usable.column("image_id").tolist())}, evaluated)[name]
    return kept, TrainingPart(
        selection=name,
        expressions=len(kept),
        images=len(np.unique(kept.column("image_id"))),
        quarantined=loaded.quarantined,
        degenerate=len(meant) - len(usable),
        no_target=len(whole) - len(meant),
        leaking_images=len(frozenset[int]().union(*shared.values())),
        leaking_expressions=len(usable) - len(clean),
        shared={other: len(image_ids) for other, image_ids in shared.items()},
        is_filtered=is_filtered,
    )


def require_splits(text: str, key: str) -> tuple[Selection, ...]:
    """Parse a comma list of splits.

    Raises:
        ConfigError: an entry names no split: a whole dataset would put its validation and test expressions
            into training.
    """
    selections = parse_selections(text)
    for selection in selections:
        if selection.split is None:
            name = f"{selection.dataset}/{selection.split_by}"
            raise ConfigError(
                f"{key} takes splits, such as {name}:train, not the whole of {name} (in {text!r}).", key=key
            )
    return selections


def require_one_split(text: str, key: str) -> Selection:
    """Parse one split.

    Raises:
        ConfigError: several, or none.
    """
    selections = require_splits(text, key)
    if len(selections) != 1:
        raise ConfigError(f"{key} takes one split such as refcoco:val, not {text!r}.", key=key)
    return selections[0]


def split_overrides(split: str, *, val: str, is_val_chosen: bool) -> list[str]:
    """Say what `ris train --split` means as overrides of the configuration.

    Args:
        split: comma list of datasets or splits; a dataset stands for its train split.
        val: `data.val` as the recipe and file have it.
        is_val_chosen: whether the user set `data.val`, which then stays.

    Returns:
        `data.train=…`, and `data.val=…` if `val` is of none of the datasets: the first one's val then.

    Raises:
        ConfigError: an unknown selection; or `val` is of none of them and the first has no val split.
    """
    selections = parse_selections(split)
    train = [f"{one.dataset}/{one.split_by}:{one.split or 'train'}" for one in selections]
    overrides = [f"data.train={','.join(train)}"]
    first = selections[0]
    is_other = require_one_split(val, "data.val").table_name not in {one.table_name for one in selections}
    if is_other and not is_val_chosen:
        if "val" not in EVALUATION_SPLITS.get(first.table_name, ("val",)):
            test = f"{first.dataset}:{EVALUATION_SPLITS[first.table_name][0]}"
            raise ConfigError(
                f"{first.dataset} has no val split to choose the best checkpoint by. Choose by another "
                f"dataset's, --set data.val=refcoco:val, or by its own test split as its published numbers "
                f"were, --set data.val={test}; scores on {test} are test-selected then.",
                dataset=first.dataset,
            )
        overrides.append(f"data.val={first.dataset}/{first.split_by}:val")
    return overrides


def evaluation_images(
    cache: FeatureCache, training: Sequence[Selection], table_names: Iterable[str]
) -> dict[str, set[int]]:
    """Find the images of every split that is not for training.

    Args:
        cache: the cache.
        training: splits that are trained on, whatever they are called.
        table_names: tables to look at.

    Returns:
        image_ids by `dataset.split_by:split`.
    """
    found: dict[str, set[int]] = {}
    for table_name in sorted(table_names):
        if table_name not in cache.manifest.datasets:
            continue
        labels = cache.manifest.datasets[table_name].splits
        trained = {"train"}
        for one in training:
            if one.table_name == table_name and one.split is not None:
                trained.update(matching_splits(one.split, labels, one.dataset))
        for split, image_id in zip(*cache.expression_columns(table_name, ("split", "image_id")), strict=True):
            if split not in trained:
                found.setdefault(f"{table_name}:{split}", set()).add(image_id)
    return found


def common_categories(cache: FeatureCache, table_names: Sequence[str]) -> CategorySet:
    """Return the category set of the first table, which all must share.

    Raises:
        ConfigError: their ids, names or prompt differ.
    """
    sets = {name: cache.categories(cache.manifest.datasets[name].category_set) for name in table_names}
    first_name, *other_names = table_names
    first = sets[first_name]
    for name in other_names:
        own, expected = (dict(zip(one.ids, one.names, strict=True)) for one in (sets[name], first))
        if own != expected or sets[name].template != first.template:
            different = sorted(own.items() ^ expected.items())
            example = f", for example {different[0][1]!r} ({different[0][0]})" if different else ""
            raise ConfigError(
                f"{first_name} and {name} have different categories{example}, so one model cannot read both. "
                "Train one that reads none, --set model.sparse_prompt=cls, or leave one dataset out.",
                table_names=(first_name, name),
            )
    return first


def _require_no_object_partition(selections: Sequence[Selection]) -> None:
    for one in selections:
        if one.split_by == "google" and one.table_name in EVALUATION_SPLITS:
            raise ConfigError(
                f"{one.dataset}/google divides objects, not images, among its splits, so its train split "
                "holds images of its own val and test. Merge another split_by, or force it with "
                "--set data.leakage=keep.",
                table_name=one.table_name,
            )


def _require_evaluation_splits(cache: FeatureCache, table_names: Sequence[str]) -> None:
    missing: dict[str, list[str]] = {}
    for table_name in table_names:
        entry = cache.manifest.datasets.get(table_name)
        if entry is None:
            continue  # `load_samples` says so, with the command that adds it.
        dataset = table_name.partition(".")[0]
        for split in EVALUATION_SPLITS.get(table_name, ()):
            labels = matching_splits(split, entry.splits, dataset)
            if not labels or not all(entry.splits[label].is_complete for label in labels):
                missing.setdefault(table_name, []).append(split)
    if missing:
        lacking = "; ".join(f"{name}: {', '.join(splits)}" for name, splits in missing.items())
        wanted = ",".join(
            f"{name.replace('.', '/', 1)}:{split}" for name, splits in missing.items() for split in splits
        )
        raise CacheMissError(
            "Which training images leak into somebody's evaluation cannot be known: the cache does not hold "
            f"these splits in full ({lacking}). Add them, `ris extract --split {wanted} --cache "
            f"{cache.root}`, or train without the filter, --set data.leakage=keep.",
            missing=missing,
        )
