"""Score saved predictions of any method: match them to samples, count on every view, apply rule sets.

What is missing, double, unknown or of another size is counted and named; nothing is guessed. H, W: original
frame.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from ris_cache.datasets.fields import shown
from ris_cache.datasets.segmentation import resize_nearest
from ris_cache.errors import DataError
from ris_cache.store.files import write_atomically
from ris_train.annotated import AnnotatedSplits
from ris_train.data.samples import Sample
from ris_train.run import finite_or_null
from ris_train.scoring.counts import Counts, SampleCount, collect, count_pixels
from ris_train.scoring.prediction_files import PredictionFile
from ris_train.scoring.predictions import ORIGINAL, Mask, Prediction, SampleId, WrongSizeError, mask_name
from ris_train.scoring.results import EvaluationResult, score_split, views_of
from ris_train.scoring.rules import default_rules, rules_named
from ris_train.scoring.samples import SampleTable
from ris_train.scoring.views import VIEWS, View
from ris_train.truth import GroundTruth

NOT_STATED: Final = "not stated"
_NUM_EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPredictions:
    """What saved predictions come to.

    Attributes:
        results: one per split.
        samples: the samples table of all splits.
        num_missing: samples without a prediction, scored as empty masks.
        num_other: predictions of the dataset's other expressions, not asked for.
    """

    results: list[EvaluationResult]
    samples: SampleTable
    num_missing: int
    num_other: int

    @property
    def weights(self) -> dict[str, str]:
        """Labels of the weights that the numbers rest on, as the predictions state them."""
        weights: dict[str, str] = self.samples.metadata["weights"]
        return weights

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; scores are fractions."""
        return self.samples.metadata | {
            "num_missing": self.num_missing,
            "num_other": self.num_other,
            "results": [result.as_dict() for result in self.results],
        }

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write `<method>.scores.json` and `<method>.samples.parquet`; returns both."""
        name = re.sub(r"[^\w.+-]", "_", self.samples.metadata["method"])
        scores, samples = folder / f"{name}.scores.json", folder / f"{name}.samples.parquet"
        self.samples.write(samples)
        text = json.dumps(finite_or_null(self.as_dict()), indent=1, allow_nan=False)
        write_atomically(scores, (text + "\n").encode())
        return scores, samples


def score_predictions(
    file: PredictionFile,
    annotated: AnnotatedSplits,
    *,
    rules: str | None,
    name: str,
    allow_missing: bool = False,
    show_progress: bool = False,
) -> ScoredPredictions:
    """Score saved predictions.

    Args:
        file: from `open_predictions`.
        annotated: what they are scored against.
        rules: `all` or names of rule sets; None for the dataset's own.
        name: of the method.
        allow_missing: score a sample without prediction as an empty mask instead of refusing.
        show_progress: whether to draw a bar on stderr.

    Raises:
        DataError: predictions are missing, double, unknown, of another size or malformed; the message counts
            them and gives examples.
        ConfigError: an unknown rule set.
    """
    samples = list(dict.fromkeys(sample for split in annotated.splits.values() for sample in split))
    dataset = annotated.table_name.partition(".")[0]
    default = default_rules(dataset, has_no_target=any(not sample.ann_ids for sample in samples))
    chosen = rules_named(default if rules is None else rules)
    counter = _Counter(file, annotated, views_of(chosen))
    num_other = len((file.sample_ids & annotated.known) - {_sample_id(sample) for sample in samples})
    missing = [sample for sample in samples if _sample_id(sample) not in file.sample_ids]
    problems = _mismatches(file, annotated, [] if allow_missing else missing)
    for sample in tqdm(samples, unit="expr", desc="score", leave=False, disable=not show_progress):
        counter.add(sample)
    _refuse(file.path, problems | counter.problems, len(samples), num_other)
    counts = counter.counts()
    notes = counter.notes()
    if missing:
        text = f"{len(missing)} samples without a prediction are scored as empty masks"
        notes = {view.name: "; ".join(filter(None, [notes.get(view.name), text])) for view in counter.views}
    position = {sample: index for index, sample in enumerate(samples)}
    metadata = _metadata(file, name, notes, counter.thresholds())
    results = []
    for split, of_split in annotated.splits.items():
        rows = np.array([position[sample] for sample in of_split], dtype=np.intp)
        results.append(
            score_split(
                f"{annotated.table_name}:{split}",
                {view: found.select(rows) for view, found in counts.items()},
                chosen,
                default_rules=default,
                category_source=metadata["category_source"],
                expressions=metadata["expressions"],
                quarantined=annotated.quarantined[split],
                degenerate=sum(sample.is_degenerate for sample in of_split),
                is_whole=annotated.is_whole[split],
                thresholds=counter.thresholds(),
                notes=notes,
            )
        )
    table = SampleTable.of(samples, counts, {annotated.table_name: annotated.instances}, metadata=metadata)
    return ScoredPredictions(
        results=results,
        samples=table,
        num_missing=len(missing),
        num_other=num_other,
    )


class _Counter:
    """Counts predictions one after the other on every view, and remembers what was wrong with them."""

    def __init__(self, file: PredictionFile, annotated: AnnotatedSplits, views: Sequence[View]) -> None:
        self.views = views
        self._file = file
        self._truth = GroundTruth({annotated.table_name: annotated.instances}, annotated.sizes)
        self._rows: dict[str, list[SampleCount]] = {view.name: [] for view in views}
        self._num_read = 0
        self._num_decided = 0
        self._num_derived = {mask_name(view): 0 for view in views}
        self.problems: dict[str, list[str]] = {"wrong size": [], "wrong image_id": []}

    def add(self, sample: Sample) -> None:
        """Count one sample; one without a prediction as an empty mask."""
        size = self._truth.frame_size(sample)
        prediction = Prediction(masks={ORIGINAL: np.zeros(size, dtype=np.bool_)})
        if _sample_id(sample) in self._file.sample_ids:
            grids = {mask_name(view): view.grid_size(size) for view in self.views}
            try:
                prediction = self._file.read(_sample_id(sample), {ORIGINAL: size} | grids)
            except WrongSizeError as error:
                facts = f"found {shown(error.facts['found'])}, expected {error.facts['expected']}"
                self.problems["wrong size"].append(f"{_sample_id(sample)}: {facts}")
            if prediction.image_id not in (None, sample.image_id):
                facts = f"found {shown(prediction.image_id)}, expected {sample.image_id}"
                self.problems["wrong image_id"].append(f"{_sample_id(sample)}: {facts}")
            self._num_read += 1
            self._num_decided += prediction.no_target is not None
        masks = {name: self._mask(prediction, name, sample) for name in self._num_derived}
        for view in self.views:
            self._rows[view.name].append(
                count_pixels(
                    masks[mask_name(view)],
                    self._truth.of(sample, view),
                    is_no_target=not sample.ann_ids,
                    says_no_target=bool(prediction.no_target),
                )
            )

    def counts(self) -> dict[str, Counts]:
        """Counts of all samples in the order in which they were added, by name of the view.

        Raises:
            DataError: some predictions say whether there is a target and others do not.
        """
        if self._num_decided not in (0, self._num_read):
            raise DataError(
                f"{self._file.path}: {self._num_decided} of {self._num_read} predictions state no_target. "
                "Either all come from a no-target head, or none does.",
                path=self._file.path,
            )
        has_head = self._num_decided > 0
        return {name: collect(rows, has_head=has_head) for name, rows in self._rows.items()}

    def notes(self) -> dict[str, str]:
        """By name of the view: that masks on its grid were not given but derived."""
        notes = {}
        for view in self.views:
            number = self._num_derived[mask_name(view)]
            if number and view.grid == ORIGINAL:
                notes[view.name] = f"{number} masks are the original ones, of another threshold perhaps"
            elif number:
                notes[view.name] = f"{number} masks resized by nearest neighbour from the original grid"
        return notes

    def thresholds(self) -> dict[str, float | None]:
        """By name of the view: its threshold if the file says that its masks were made by it, else None."""
        stated = self._file.info.get("thresholds")
        stated = stated if isinstance(stated, dict) else {}
        return {
            view.name: view.threshold
            if stated.get(mask_name(view)) == view.threshold and not self._num_derived[mask_name(view)]
            else None
            for view in self.views
        }

    def _mask(self, prediction: Prediction, name: str, sample: Sample) -> Mask:
        if name in prediction.masks:
            return prediction.masks[name]
        if _sample_id(sample) in self._file.sample_ids:
            self._num_derived[name] += 1
        view = next(view for view in VIEWS.values() if mask_name(view) == name)
        original = prediction.masks[ORIGINAL]
        if view.grid == ORIGINAL:
            return original
        return resize_nearest(original, self._truth.grid_size(sample, view))


def _mismatches(
    file: PredictionFile, annotated: AnnotatedSplits, missing: Sequence[Sample]
) -> dict[str, list[str]]:
    """Examples, and with them numbers, of predictions that do not match the samples one to one."""
    return {
        "missing": [str(_sample_id(sample)) for sample in missing],
        "duplicate": [str(sample_id) for sample_id in file.duplicates],
        "unknown": [
            *map(str, sorted(file.sample_ids - annotated.known)),
            *(f"{name!r:.80}" for name in file.strays),
        ],
    }


def _refuse(path: Path, problems: Mapping[str, list[str]], num_samples: int, num_other: int) -> None:
    found = {kind: examples for kind, examples in problems.items() if examples}
    if not found:
        return
    lines = []
    for kind, examples in found.items():
        more = "; …" if len(examples) > _NUM_EXAMPLES else ""
        lines.append(f"{len(examples)} {kind} ({'; '.join(examples[:_NUM_EXAMPLES])}{more})")
    hint = " --allow-missing scores missing ones as empty masks." if "missing" in found else ""
    if "missing" in found and num_other:
        hint = f" {num_other} predictions are of the dataset's other expressions.{hint}"
    if "unknown" in found:
        hint += " A cache knows only what was extracted into it, --data every split."
    raise DataError(
        f"{path} does not match the {num_samples} samples, as (ref_id, sent_id): {', '.join(lines)}. Correct "
        f"the predictions, or name the split that they are of.{hint}",
        path=path,
        **{kind.replace(" ", "_"): len(examples) for kind, examples in found.items()},
    )


def _metadata(
    file: PredictionFile, name: str, notes: Mapping[str, str], thresholds: Mapping[str, float | None]
) -> dict[str, Any]:
    """What the samples table says of itself: what the file of predictions says, as far as it is text."""
    info = file.info
    labels = {
        key: info[key] if isinstance(info.get(key), str) else NOT_STATED
        for key in ("category_source", "text", "fingerprint")
    }
    weights = info.get("weights", {})
    weights = weights if isinstance(weights, dict) else {}
    return labels | {
        "method": name,
        "expressions": info["expressions"] if isinstance(info.get("expressions"), str) else "own",
        "weights": {key: value if isinstance(value, str) else shown(value) for key, value in weights.items()},
        "source": "predictions",
        "predictions": str(file.path),
        "notes": dict(notes),
        "thresholds": dict(thresholds),
    }


def _sample_id(sample: Sample) -> SampleId:
    return sample.ref_id, sample.sent_id
