"""Look at datasets before anything is extracted from them: counts, images, annotations, leakage."""

from ris_cache.datasets.check.found import find_datasets
from ris_cache.datasets.check.report import CheckReport, DatasetReport, Failure, MergeReport
from ris_cache.datasets.check.run import check_datasets

__all__ = ["CheckReport", "DatasetReport", "Failure", "MergeReport", "check_datasets", "find_datasets"]
