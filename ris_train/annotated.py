"""What predictions are scored against: splits of a dataset, from a cache's tables or from its own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.records import ExpressionRecord, InstanceRecord
from ris_cache.datasets.selection import Selection, matching_splits, select_split
from ris_cache.errors import CacheMissError, ConfigError
from ris_cache.store.cache import FeatureCache
from ris_train.data.merge import EVALUATION_SPLITS
from ris_train.data.samples import Sample, load_samples
from ris_train.scoring.predictions import SampleId


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotatedSplits:
    """Splits of one dataset with their ground truth, from a cache or from the dataset's files.

    Attributes:
        table_name: `dataset.split_by`.
        splits: samples by split, as `Selection.split` names it.
        quarantined: by split, expressions left out because the cache has no features of their image.
        is_whole: by split, whether these are all its expressions; a cache may hold a part.
        known: every expression of the dataset, those of other splits and those left out too.
        instances: by ann_id.
        sizes: (H, W) by image_id.
    """

    table_name: str
    splits: Mapping[str, Sequence[Sample]]
    quarantined: dict[str, int]
    is_whole: dict[str, bool]
    known: frozenset[SampleId]
    instances: Mapping[int, InstanceRecord]
    sizes: Mapping[int, tuple[int, int]]

    @classmethod
    def from_cache(
        cls, cache: FeatureCache, selections: Sequence[Selection], *, text: str
    ) -> AnnotatedSplits:
        """Take them from a cache's tables; features are not read.

        Args:
            text: `raw` or `sent`.

        Raises:
            ConfigError: selections of several datasets.
            CacheMissError: the dataset or split was not extracted into this cache.
        """
        name = _one_table(selections)
        if name not in cache.manifest.datasets:
            raise CacheMissError(
                f"{cache.root} holds no expressions of {name}; it holds "
                f"{', '.join(cache.manifest.datasets) or 'none'}. Take the ground truth from the dataset's "
                f"own files with --data, or add it: `ris extract --split {name.replace('.', '/', 1)} --cache "
                f"{cache.root}`.",
                table_name=name,
            )
        spelt = _spelt_out(selections, tuple(cache.manifest.datasets[name].splits))
        sets = {selection.split or "": load_samples(cache, selection, text=text) for selection in spelt}
        return cls(
            table_name=name,
            splits={split: found.samples for split, found in sets.items()},
            quarantined={split: found.quarantined for split, found in sets.items()},
            is_whole={selection.split or "": holds_whole(cache, selection) for selection in spelt},
            known=_sample_ids(cache.expressions(name)),
            instances=cache.instances(name),
            sizes=cache.sizes,
        )

    @classmethod
    def from_files(cls, data_root: Path, selections: Sequence[Selection], *, text: str) -> AnnotatedSplits:
        """Read them from the dataset's own files; no cache is needed.

        Args:
            text: `raw` or `sent`.

        Raises:
            ConfigError: selections of several datasets, or an unknown split.
            DataError: the files are missing or damaged.
        """
        name = _one_table(selections)
        dataset = load_dataset(data_root, selections[0].dataset, selections[0].split_by)
        splits = {
            selection.split or "": tuple(
                _sample(expression, name, text) for expression in select_split(dataset, selection.split or "")
            )
            for selection in _spelt_out(selections, dataset.splits)
        }
        return cls(
            table_name=name,
            splits=splits,
            quarantined=dict.fromkeys(splits, 0),
            is_whole=dict.fromkeys(splits, True),
            known=_sample_ids(dataset.expressions),
            instances=dataset.instances,
            sizes={image_id: (image.height, image.width) for image_id, image in dataset.images.items()},
        )


def holds_whole(cache: FeatureCache, selection: Selection) -> bool:
    """Whether a cache holds a split in full.

    One extracted with `--limit` is a part, and so is RefCOCO's `test` where the cache lacks `testB`.

    Args:
        selection: names a split of a dataset that the cache has.
    """
    splits = cache.manifest.datasets[selection.table_name].splits
    published = EVALUATION_SPLITS.get(selection.table_name, ())
    labels = {
        label
        for present in (published, splits)
        for label in matching_splits(selection.split or "", present, selection.dataset)
    }
    return all(label in splits and splits[label].is_complete for label in labels)


def _one_table(selections: Sequence[Selection]) -> str:
    names = list(dict.fromkeys(selection.table_name for selection in selections))
    if len(names) != 1:
        raise ConfigError(
            f"One file of predictions belongs to one dataset, not to {', '.join(names) or 'none'}: ids of "
            "different datasets may be the same. Score each by itself.",
            tables=names,
        )
    return names[0]


def _spelt_out(selections: Sequence[Selection], present: Sequence[str]) -> list[Selection]:
    """Spell a selection without a split out into the dataset's splits without train."""
    spelt: list[Selection] = []
    for selection in selections:
        splits = (
            [split for split in present if split != "train"] if selection.split is None else [selection.split]
        )
        spelt += [
            Selection(dataset=selection.dataset, split_by=selection.split_by, split=split) for split in splits
        ]
    if not spelt:
        raise ConfigError(f"{selections[0].table_name} has no split but train; name it with --split.")
    return list(dict.fromkeys(spelt))


def _sample(expression: ExpressionRecord, table_name: str, text: str) -> Sample:
    return Sample(
        table_name=table_name,
        split=expression.split,
        ref_id=expression.ref_id,
        sent_id=expression.sent_id,
        image_id=expression.image_id,
        text=expression.raw if text == "raw" else expression.sent,
        ann_ids=expression.ann_ids,
        category_id=expression.category_ids[0] if expression.category_ids else -1,
        clip_category_id=-1,
        is_degenerate=expression.is_degenerate,
    )


def _sample_ids(expressions: Sequence[ExpressionRecord]) -> frozenset[SampleId]:
    return frozenset((expression.ref_id, expression.sent_id) for expression in expressions)
