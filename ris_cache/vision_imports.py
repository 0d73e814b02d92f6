"""Make torchvision importable before the libraries that import it on their own.

segment_anything, open_clip and (where torchvision is installed) transformers import torchvision, though `ris`
calls none of its compiled operators. A torchvision built for another torch, such as a CUDA build beside a CPU
torch, cannot load those operators, and its own import then stops at registering a rule for one of them.
Declaring the two operators that are missing is enough to use everything else of it.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from ris_cache.errors import RisError

_logger = logging.getLogger(__name__)

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# torch forgets a declaration when its Library object is collected, so this list must outlive the import.
_declarations: list[torch.library.Library] = []


def ensure_torchvision() -> None:
    """Import torchvision, repairing the one known failure of a build that does not match torch.

    Call it before importing segment_anything, open_clip or transformers' BERT; calling it again costs
    nothing. The schemas are declared only after the import has failed for want of them: a torchvision that
    loads its operators would refuse a second declaration.

    Raises:
        RisError: torchvision is not installed.
        RuntimeError: torchvision fails in any other way, or once more after the repair; its own error.
    """
    try:
        _import_torchvision()
    except RuntimeError as error:
        if not str(error).startswith(_MISSING_OPERATOR):
            raise
        _forget_torchvision()
        _declare_schemas()
        _import_torchvision()
        _logger.warning(
            "torchvision %s was built for another torch than %s and its compiled operators are unavailable; "
            "ris does not use them and goes on. To repair: pip install --force-reinstall --no-deps "
            "torchvision, from the same package index that this torch came from.",
            _installed_version("torchvision"),
            torch.__version__,
        )


def is_repaired() -> bool:
    """Whether torchvision was imported without its compiled operators, built for another torch."""
    return bool(_declarations)


def _import_torchvision() -> None:
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise RisError(
            "torchvision is not installed, and segment_anything and open_clip import it. "
            f"Install the release that pairs with torch {torch.__version__}, from the same package index: "
            "pip install --no-deps torchvision",
            package="torchvision",
            torch_version=torch.__version__,
        ) from error


def _forget_torchvision() -> None:
    """Drop the submodules that a failed import leaves behind; kept, they would hide the retry's errors."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_schemas() -> None:
    if _declarations:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declarations.append(library)


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(unknown version)"
