"""The machine that was measured, and the tables of results."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from layouts.cold import Cold
from layouts.timing import Warm

_LIBRARIES = (
    "ris",
    "numpy",
    "torch",
    "zarr",
    "h5py",
    "google-crc32c",
    "litdata",
    "mosaicml-streaming",
    "tensorstore",
    "zarrs",
)
_FULLY = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where the figures were taken.

    Attributes:
        cores: that this process may use.
        memory_gb: in 1e9 bytes.
        file_system: type, of the benchmark's directory.
        libraries: version by name, of those installed.
    """

    processor: str
    cores: int
    memory_gb: float
    system: str
    file_system: str
    python: str
    libraries: dict[str, str]


def describe_machine(directory: Path) -> Machine:
    """Describe this machine.

    Args:
        directory: where the files are written.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    return Machine(
        processor=_first_value(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown",
        cores=len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        system=platform.platform(),
        file_system=_file_system(directory),
        python=platform.python_version(),
        libraries={name: found for name in _LIBRARIES if (found := _installed(name)) is not None},
    )


def machine_lines(machine: Machine) -> list[str]:
    """Return the machine as two lines of text."""
    libraries = ", ".join(f"{name} {found}" for name, found in machine.libraries.items())
    return [
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gb:g} GB, {machine.file_system}, "
        f"{machine.system}",
        f"Python {machine.python}, {libraries}",
    ]


def warm_table(results: Sequence[Warm], *, markdown: bool) -> list[str]:
    """Return the table of warm reading, one row per layout, fastest first within what was measured."""
    header = ("layout", "ratio", "rounds", "images/s", "GB/s", "first pass", "write GB/s", "size", "what")
    measured = sorted((warm for warm in results if warm.missing is None), key=lambda warm: -warm.ratio)
    rows = [
        (
            warm.name,
            f"{warm.ratio:.2f}",
            f"{warm.worst:.2f}-{warm.best:.2f}",
            f"{warm.images_per_s:,.0f}",
            f"{warm.read_gb_per_s:.2f}",
            f"{warm.first_pass:,.0f}",
            f"{warm.write_gb_per_s:.2f}",
            f"{warm.size:.2f}",
            warm.description,
        )
        for warm in measured
    ]
    rows += [
        (warm.name, "-", "-", "-", "-", "-", "-", "-", f"{warm.description} ({warm.missing})")
        for warm in results
        if warm.missing is not None
    ]
    return table(header, rows, markdown=markdown)


def warm_notes(results: Iterable[Warm]) -> list[str]:
    """Return what a reader of the table must know."""
    evicted = [warm for warm in results if warm.missing is None and warm.resident < _FULLY]
    return [
        "ratio: the ceiling's time over the layout's for the same images; rounds: its range; GB/s: bytes as",
        "stored; first pass: images/s of a new reader, opening included; write: float16, until on the disk.",
        *(
            f"Not warm: only {warm.resident:.0%} of the files of {warm.name} or of the ceiling were still in "
            "the page cache after a round. Take fewer --images, or fewer layouts with --only."
            for warm in evicted
        ),
    ]


def cold_table(results: Sequence[Cold], *, markdown: bool) -> list[str]:
    """Return the table of cold reading."""
    header = ("reader", "ratio", "rounds", "images/s", "GB/s", "what")
    rows = [
        (
            cold.name,
            f"{cold.ratio:.2f}",
            f"{cold.worst:.2f}-{cold.best:.2f}",
            f"{cold.images_per_s:,.0f}",
            f"{cold.read_gb_per_s:.2f}",
            cold.description,
        )
        for cold in results
    ]
    return table(header, rows, markdown=markdown)


def cold_notes(results: Iterable[Cold]) -> list[str]:
    """Return what a reader of the table must know."""
    legend = (
        "ratio: the sequential read's time over this one's, taken one after the other; rounds: its range."
    )
    kept = max((cold.kept for cold in results), default=0.0)
    if kept > 1 - _FULLY:
        return [
            legend,
            f"Not cold: the file system kept up to {kept:.0%} of a file in memory although asked to drop it, "
            "as tmpfs does. Put --dir on a disk.",
        ]
    return [legend, "mincore confirms that no file was in the page cache when its reading began."]


def table(
    header: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    *,
    markdown: bool,
    ends_with_text: bool = True,
) -> list[str]:
    """Align columns: text, which the first is and the last may be, to the left, figures to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    is_text = [column == 0 or (ends_with_text and column == len(header) - 1) for column in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    rules = [
        "-" * width if left or not markdown else "-" * (width - 1) + ":"
        for width, left in zip(widths, is_text, strict=True)
    ]
    return [line(header), line(tuple(rules)), *map(line, rows)]


def _first_value(path: Path, key: str) -> str | None:
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _file_system(directory: Path) -> str:
    mounts = Path("/proc/mounts")
    if not mounts.is_file():
        return "unknown file system"
    kinds: dict[str, str] = {}
    for line in mounts.read_text().splitlines():
        _, point, kind, *_ = line.split()
        kinds[point] = kind
    resolved = directory.resolve()
    return next(
        (kinds[str(path)] for path in (resolved, *resolved.parents) if str(path) in kinds),
        "unknown file system",
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
