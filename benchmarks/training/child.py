"""Measuring in a process of its own, so that no memory of anything else counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ris_cache.errors import RisError

_BENCHMARKS = Path(__file__).parents[1]


class ChildError(RisError):
    """A process that was to measure failed; what it said is above."""


def in_own_process(module: str, *arguments: object) -> Any:
    """Run a module with arguments and return the JSON that it prints.

    Args:
        module: by its name, seen from the directory of the benchmarks, where it runs; paths among the
            arguments are therefore absolute.
        arguments: of its command line.

    Raises:
        ChildError: it failed, with its exit code.
    """
    found = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=_BENCHMARKS,
        stdout=subprocess.PIPE,
        check=False,
    )
    if found.returncode:
        raise ChildError(
            f"The process that measures, {module}, ended with {found.returncode}; what it said is above.",
            module=module,
            exit_code=found.returncode,
        )
    return json.loads(found.stdout)
