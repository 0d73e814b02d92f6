"""Training: exact, watched, and resumable at any step."""

from __future__ import annotations

from ris_train.training.building import build_model
from ris_train.training.loop import TrainingReport
from ris_train.training.progress import Progress
from ris_train.training.start import train
from ris_train.training.watch import Reproduced, reproduce

__all__ = ["Progress", "Reproduced", "TrainingReport", "build_model", "reproduce", "train"]
