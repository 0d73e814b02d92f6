"""How much memory is left: what the kernel says, or what a cgroup leaves of it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ris_cache import memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system of 8 GiB available, whose process is in /jobs/mine; nothing is limited."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal:  {16 * GIB >> 10} kB\nMemAvailable:   {8 * GIB >> 10} kB\nHugePages_Total:  0\n"
    )
    (tmp_path / "proc" / "self" / "cgroup").write_text("1:cpu:/elsewhere\n0::/jobs/mine\n")
    return tmp_path


def limit(system: Path, path: str, most: str, used: int, cached: int) -> None:
    directory = system / "cgroup" / path
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "memory.max").write_text(f"{most}\n")
    (directory / "memory.current").write_text(f"{used}\n")
    (directory / "memory.stat").write_text(
        f"anon {used - cached}\nfile {cached}\ninactive_file {cached // 4}\nactive_file {cached - cached // 4}\n"
    )


def test_without_a_limit_it_is_what_the_kernel_estimates(system: Path) -> None:
    assert memory.available_memory() == 8 * GIB
    limit(system, "jobs/mine", "max", 7 * GIB, 0)
    assert memory.available_memory() == 8 * GIB


def test_a_cgroup_leaves_its_limit_without_what_its_programs_hold(system: Path) -> None:
    limit(system, "jobs/mine", str(4 * GIB), used=3 * GIB, cached=2 * GIB)
    assert memory.available_memory() == 3 * GIB


def test_the_tightest_of_the_cgroups_around_the_process_counts(system: Path) -> None:
    limit(system, "jobs/mine", str(6 * GIB), used=0, cached=0)
    limit(system, "jobs", str(5 * GIB), used=GIB, cached=0)
    limit(system, "elsewhere", str(GIB), used=0, cached=0)
    assert memory.available_memory() == 4 * GIB


def test_a_limit_above_the_memory_of_the_machine_changes_nothing(system: Path) -> None:
    limit(system, "jobs/mine", str(64 * GIB), used=0, cached=0)
    assert memory.available_memory() == 8 * GIB


def test_a_cgroup_over_its_limit_leaves_nothing(system: Path) -> None:
    limit(system, "jobs/mine", str(GIB), used=2 * GIB, cached=0)
    assert memory.available_memory() == 0


def test_a_system_that_does_not_tell_has_all_of_its_memory(system: Path) -> None:
    (system / "proc" / "meminfo").unlink()
    (system / "proc" / "self" / "cgroup").unlink()
    assert memory.available_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_this_machine_has_some_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < memory.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_what_is_freed_is_given_back() -> None:
    """Small blocks, which glibc keeps under whatever policy; the last one lies above them."""
    code = (
        "import ctypes, sys\n"
        "from ris_cache.memory import keep_freed_memory, own_memory, return_freed_memory\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "keep_freed_memory()\n"
        "blocks = [ctypes.c_void_p(libc.malloc(10000)) for _ in range(10000)]\n"
        "for block in blocks: ctypes.memset(block, 1, 10000)\n"
        "full = own_memory()\n"
        "for block in blocks[:-1]: libc.free(block)\n"
        "kept = own_memory()\n"
        "return_freed_memory()\n"
        "print(full, kept, own_memory())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    full, kept, left = map(int, found.stdout.split())
    assert full > 100_000_000
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # glibc
        assert kept > 0.9 * full
        assert left < 0.5 * full
