"""Imports run one way, cli -> ris_train -> ris_cache, and torch stays out where it is not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "ris_cache": {"ris_cache"},
    "ris_train": {"ris_train", "ris_cache"},
    "cli": {"cli", "ris_train", "ris_cache"},
}
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(source: str, package: str) -> set[str]:
    """Top-level names that a module imports anywhere in it, inside functions too.

    Args:
        package: whose module it is; what a relative import stays within.
    """
    return set(_imports(ast.parse(source), package))


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value).partition(".")[0]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import cli.app as app", {"cli"}),
        ("def f():\n    from cli.app import main", {"cli"}),
        ("from .x import y", {"ris_cache"}),
        ("import importlib\nimportlib.import_module('cli.app')", {"importlib", "cli"}),
        ("# import cli\ntext = 'import cli'", set()),
    ],
)
def test_the_walk_sees_every_kind_of_import(source: str, expected: set[str]) -> None:
    assert imported_packages(source, "ris_cache") == expected


def test_the_walk_finds_the_sources() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert names >= {"cli/app.py", "ris_train/model/segmenter.py", "ris_cache/store/cache.py"}
    assert len(names) > 50


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = imported_packages(path.read_text(encoding="utf-8"), package) & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize(
    "statement",
    [
        "import cli.app",
        "import ris_cache",
        "import ris_cache.datasets",
        "import ris_cache.encoders.spec, ris_cache.encoders.weights",
        "import ris_cache.store.cache, ris_cache.store.writer",
        "from ris_cache import FeatureCache",
        "import ris_train.config, ris_train.run",
        "import ris_train.scoring",
        "import ris_train.data.samples, ris_train.data.masks, ris_train.data.sampler",
    ],
)
def test_torch_is_not_loaded_by(statement: str) -> None:
    program = (
        f"import sys\n{statement}\n"
        "print(*sorted({'torch', 'transformers', 'open_clip', 'torchvision'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == []


def test_the_check_above_would_notice_torch() -> None:
    program = "import sys; import ris_train.frames; sys.exit('torch' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT).returncode == 0


def test_a_cache_is_read_without_torch(tiny_cache: Path) -> None:
    program = (
        "import sys\n"
        "from ris_cache import FeatureCache\n"
        "cache = FeatureCache.open(sys.argv[1])\n"
        "batch = cache.read(cache.image_ids[:3])\n"
        "assert batch.sam.shape[0] == 3 and cache.expressions('refcoco.unc')\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(tiny_cache)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_every_public_name_of_ris_cache_is_there() -> None:
    import ris_cache

    assert set(ris_cache.__all__) <= set(dir(ris_cache))
    for name in ris_cache.__all__:
        assert getattr(ris_cache, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'FeatureCash'"):
        ris_cache.FeatureCash  # noqa: B018
