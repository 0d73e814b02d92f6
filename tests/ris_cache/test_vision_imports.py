"""The torchvision repair: for real in fresh interpreters, otherwise with imports that fail on demand."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from ris_cache import vision_imports
from ris_cache.errors import RisError

MISSING = "operator torchvision::nms does not exist"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let each import take the next of the given outcomes; the returned list logs what was done."""

    def install(*outcomes: Exception | None) -> list[str]:
        log: list[str] = []
        remaining = list(outcomes)

        def import_module(name: str) -> None:
            log.append(f"import {name}")
            outcome = remaining.pop(0)
            if outcome is not None:
                raise outcome

        monkeypatch.setattr(vision_imports.importlib, "import_module", import_module)
        monkeypatch.setattr(vision_imports, "_declare_schemas", lambda: log.append("declare"))
        monkeypatch.setattr(vision_imports, "_forget_torchvision", lambda: log.append("forget"))
        return log

    return install


def test_a_fresh_interpreter_can_import_everything_that_needs_torchvision() -> None:
    done = run_python(
        "from ris_cache.vision_imports import ensure_torchvision, _declarations\n"
        "ensure_torchvision(); ensure_torchvision()\n"
        "import torchvision, segment_anything, open_clip\n"
        "from transformers import BertModel\n"
        "print(len(_declarations))"
    )
    assert done.returncode == 0, done.stderr
    needed_repair = int(done.stdout.split()[-1])
    assert needed_repair in (0, 1)
    assert done.stderr.count("To repair: pip install") == needed_repair


def test_a_half_imported_torchvision_is_repaired_too() -> None:
    done = run_python(
        "try:\n"
        "    import torchvision\n"
        "except RuntimeError:\n"
        "    pass\n"
        "from ris_cache.vision_imports import ensure_torchvision\n"
        "ensure_torchvision()\n"
        "import torchvision.transforms as t\n"
        "print(t.Normalize)"
    )
    assert done.returncode == 0, done.stderr


def test_a_working_torchvision_is_left_alone(
    imports: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    log = imports(None)
    vision_imports.ensure_torchvision()
    assert log == ["import torchvision"]
    assert not caplog.records


def test_the_missing_operator_is_declared_once_and_the_import_retried_with_a_warning(
    imports: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    log = imports(RuntimeError(MISSING), None)
    with caplog.at_level(logging.WARNING):
        vision_imports.ensure_torchvision()
    assert log == ["import torchvision", "forget", "declare", "import torchvision"]
    (record,) = caplog.records
    assert torch.__version__ in record.getMessage()
    assert "pip install" in record.getMessage()


def test_a_retry_that_fails_raises_its_own_error(imports: Callable[..., list[str]]) -> None:
    log = imports(RuntimeError(MISSING), RuntimeError("still broken"))
    with pytest.raises(RuntimeError, match="still broken"):
        vision_imports.ensure_torchvision()
    assert log.count("import torchvision") == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA is on fire"),
        ImportError("libcudart.so.13"),
        ModuleNotFoundError("No PIL", name="PIL"),
    ],
)
def test_any_other_failure_is_not_touched(imports: Callable[..., list[str]], error: Exception) -> None:
    log = imports(error)
    with pytest.raises(type(error)) as caught:
        vision_imports.ensure_torchvision()
    assert caught.value is error
    assert log == ["import torchvision"]


def test_an_absent_torchvision_says_how_to_install_it(imports: Callable[..., list[str]]) -> None:
    imports(ModuleNotFoundError("No module named 'torchvision'", name="torchvision"))
    with pytest.raises(RisError, match="pip install --no-deps torchvision") as caught:
        vision_imports.ensure_torchvision()
    assert caught.value.facts["torch_version"] == torch.__version__
