"""Random damage to any file of a cache is either reported or harmless; nothing in between.

This file is a program too: pytest runs it in processes of its own, so that a crash or a hang of a library is
a finding about one mutation and not the end of the tests. `python test_fuzz.py SEED FIRST STOP CACHE…` damages
copies of the caches, and prints one line per mutation, before it and after it.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ris_cache.errors import RisError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.checking import RowChecker
from ris_cache.store.manifest import load_manifest
from ris_cache.store.verify import verify

SECONDS_PER_MUTATION = 20
NUM_PROCESSES = 2
Content = dict[str, bytes]
"""Every file of a cache, by path relative to it."""


# --- the program ---------------------------------------------------------------------------------------------


def read_files(root: Path) -> Content:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    run = rng.randbytes(rng.randint(1, 64))[: len(content) - start]
    return content[:start] + run + content[start + len(run) :]


def change_digit(content: bytes, rng: random.Random) -> bytes:
    """A number that is still a number gets past any parser."""
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    if not places:
        return flip_bits(content, rng)
    place = rng.choice(places)
    return content[:place] + rng.choice(b"0123456789").to_bytes(1, "big") + content[place + 1 :]


def zero_block(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    length = min(rng.choice((16, 512, 4096)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def insert(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content) + 1)
    return content[:start] + rng.randbytes(rng.randint(1, 64)) + content[start:]


def cut_out(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 64) :]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((0, 1, rng.randrange(len(content)), len(content) - 1))]


def extend(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice((bytes(rng.randint(1, 5000)), rng.randbytes(rng.randint(1, 64)), content))


CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_bits,
    overwrite,
    change_digit,
    zero_block,
    insert,
    cut_out,
    truncate,
    extend,
)


def damage(root: Path, whole: Content, rng: random.Random) -> str:
    """Damage one file, or two; returns what was done."""
    name, other = rng.sample([path for path, content in whole.items() if content], 2)
    kind = rng.choice((*CHANGES, *CHANGES, "delete", "swap", "copy"))
    if callable(kind):
        (root / name).write_bytes(kind(whole[name], rng))
        return f"{kind.__name__} {name}"
    if kind == "delete":
        (root / name).unlink()
        return f"delete {name}"
    (root / name).write_bytes(whole[other])
    if kind == "swap":
        (root / other).write_bytes(whole[name])
    return f"{kind} {other} to {name}"


def parts_of(root: Path) -> dict[str, Callable[[], Any]]:
    """Everything that can be read from a cache, each part by itself; opening fails with the first."""
    cache = FeatureCache.open(root)
    ids = cache.image_ids.tolist()

    def features(image_ids: list[int]) -> list[tuple[str, bytes]]:
        batch = cache.read(image_ids)
        assert batch.image_ids.tolist() == image_ids
        return [(name, array.tobytes()) for name, array in batch.stored.items()]

    def categories(name: str) -> tuple[Any, ...]:
        found = cache.categories(name)
        return found.ids, found.names, found.template, found.embeddings.tobytes()

    parts: dict[str, Callable[[], Any]] = {
        f"image {image_id}": lambda image_id=image_id: features([image_id]) for image_id in ids
    }
    parts["all images"] = lambda: features(ids)
    parts["prefetched"] = lambda: [
        batch.stored["sam"].tobytes() for batch in cache.prefetch([ids[:3], ids[3:]])
    ]
    parts["ids"] = lambda: (ids, len(cache), cache.sizes, cache.quarantined, cache.images)
    for name in cache.manifest.datasets:
        parts[f"expressions of {name}"] = lambda name=name: cache.expressions(name)
        parts[f"instances of {name}"] = lambda name=name: cache.instances(name)
    for name in cache.manifest.category_sets:
        parts[f"categories {name}"] = lambda name=name: categories(name)
    parts["heads"] = lambda: {name: array.tobytes() for name, array in cache.sam_heads().items()}
    parts["what made it"] = lambda: (cache.fingerprint, cache.manifest.arrays, cache.manifest.dtype)
    return parts


def wrong_reading(root: Path, expected: dict[str, Any]) -> Iterator[str]:
    """Yield what is neither an error of ours nor the right value; other exceptions pass through."""
    try:
        parts = parts_of(root)
    except RisError:
        return
    for name in expected.keys() - parts.keys():
        yield f"{name} is gone"
    for name, read in parts.items():
        try:
            found = read()
        except RisError:
            continue
        if name not in expected or found != expected[name]:
            yield f"{name} was read wrongly"


def wrong_verdict(root: Path, whole: Content, listed: set[str]) -> Iterator[str]:
    """Yield what `verify` overlooked, and what it blamed though nothing was done to it."""
    left = read_files(root)
    changed = {path for path in whole.keys() | left.keys() if whole.get(path) != left.get(path)}
    try:
        report, quick = verify(root), verify(root, fast=True)
    except RisError:
        if "manifest.json" not in changed:
            yield "verify gave up"
        return
    if "manifest.json" in changed and report.manifest is None:
        return
    named = {finding.path for finding in report.findings}
    if changed & listed - named:
        yield f"verify overlooked {sorted(changed & listed - named)}"
    if named - changed:
        yield f"verify blamed {sorted(named - changed)}"
    if {finding.path for finding in quick.findings} - named:
        yield "verify --fast found more than verify"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(seed: str, first: int, stop: int, caches: list[Path]) -> None:
    originals = [(read_files(cache), {n: read() for n, read in parts_of(cache).items()}) for cache in caches]
    listed = [set(load_manifest(cache).files) for cache in caches]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends even a library that never returns to Python
    with tempfile.TemporaryDirectory() as directory:
        for number in range(first, stop):
            rng = random.Random(f"{seed}:{number}")
            which = number % len(caches)
            whole, expected = originals[which]
            root = Path(directory, str(number))
            shutil.copytree(caches[which], root)
            done = damage(root, whole, rng)
            say(f"{number} begins: {caches[which].name}: {done}")
            signal.alarm(SECONDS_PER_MUTATION)
            try:
                problems = [*wrong_reading(root, expected), *wrong_verdict(root, whole, listed[which])]
            except Exception as error:
                problems = [f"{type(error).__module__}.{type(error).__qualname__}: {error}"]
            signal.alarm(0)
            shutil.rmtree(root)
            say(f"{number} ends: {json.dumps(problems)}")


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [Path(argument) for argument in sys.argv[4:]])


# --- the tests -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory, drawing) -> list[Path]:
    """One of each backend and kind of element: two datasets, 14 images in four shards, one in quarantine."""
    roots = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        for backend, dtype in (
            ("zarr", "float16"),
            ("hdf5", "float16"),
            ("zarr", "int8"),
            ("hdf5", "bfloat16"),
        ):
            root = tmp_path_factory.mktemp("fuzz") / f"{backend}-{dtype}"
            draw = type(drawing)(backend=backend, dtype=dtype)
            draw.extract(root, range(9), bad=(5,))
            draw.extract(root, range(4, 14), table="refcocog.umd")
            roots.append(root)
    return roots


def problems_of(caches: list[Path], seed: str, first: int, stop: int) -> list[str]:
    """Run mutations in a process, and in another one after each that kills it; returns what went wrong."""
    problems = []
    while first < stop:
        command = [sys.executable, __file__, seed, str(first), str(stop), *map(str, caches)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = finished.stdout.splitlines()
        begun = ""
        for line in lines:
            number, _, outcome = line.partition(" ")
            if outcome.startswith("begins: "):
                begun = line
            elif outcome != "ends: []":
                problems.append(f"{begun}\n    {outcome}")
            first = int(number) + 1
        if finished.returncode != 0:
            problems.append(
                f"{begun}\n    ended the process: {finished.returncode}\n{finished.stderr[-2000:]}"
            )
            if not lines:
                break
    return problems


def require_no_problems(caches: list[Path], seed: str, num_mutations: int) -> None:
    bounds = [num_mutations * part // NUM_PROCESSES for part in range(NUM_PROCESSES + 1)]
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        parts = pool.map(lambda span: problems_of(caches, seed, *span), itertools.pairwise(bounds))
        problems = [problem for part in parts for problem in part]
    assert not problems, f"{len(problems)} of {num_mutations}:\n" + "\n".join(problems[:20])


def test_random_damage_is_reported_or_harmless(caches):
    require_no_problems(caches, "every run", 320)


@pytest.mark.exhaustive
def test_ten_thousand_damages_are_reported_or_harmless(caches):
    require_no_problems(caches, "exhaustive", 10_000)


def test_the_program_says_what_goes_wrong(caches, tmp_path):
    """A cache that was changed behind the back of its checksums is read wrongly, and that is seen."""
    expected = {name: read() for name, read in parts_of(caches[0]).items()}
    assert list(wrong_reading(caches[0], expected)) == []
    assert list(wrong_reading(caches[0], expected | {"image 1": b"other"})) == ["image 1 was read wrongly"]
    whole = read_files(caches[0])
    shutil.copytree(caches[0], tmp_path / "feats")
    listed = set(load_manifest(caches[0]).files)
    assert list(wrong_verdict(tmp_path / "feats", whole, listed)) == []
    believed = whole | {"sam_heads.safetensors": b"other"}
    assert list(wrong_verdict(tmp_path / "feats", believed, listed)) == [
        "verify overlooked ['sam_heads.safetensors']"
    ]


def test_without_checksums_damage_would_be_read_as_features(caches, tmp_path, monkeypatch):
    """What these tests look for does happen: only the checksums of rows stand before it."""
    expected = {name: read() for name, read in parts_of(caches[0]).items()}
    root = tmp_path / "feats"
    shutil.copytree(caches[0], root)
    content = bytearray((root / "features.zarr/sam/c/0/0/0/0").read_bytes())
    content[0] ^= 1
    (root / "features.zarr/sam/c/0/0/0/0").write_bytes(content)
    assert list(wrong_reading(root, expected)) == []
    monkeypatch.setattr(RowChecker, "first_wrong", lambda *arguments: None)
    assert "image 0 was read wrongly" in list(wrong_reading(root, expected))


def test_a_mutation_that_ends_the_process_is_a_problem_and_the_next_ones_run(caches, monkeypatch):
    lines = [
        ("0 begins: a: swap\n0 ends: []\n1 begins: a: flip\n", -signal.SIGSEGV),
        ('2 begins: a: cut\n2 ends: ["heads was read wrongly"]\n', 0),
    ]

    def pretend(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        printed, code = lines.pop(0)
        assert command[3] == printed.split()[0]
        return subprocess.CompletedProcess(command, code, stdout=printed, stderr="")

    monkeypatch.setattr(subprocess, "run", pretend)
    crash, wrong = problems_of(caches, "seed", 0, 3)
    assert "1 begins: a: flip" in crash
    assert str(-signal.SIGSEGV) in crash
    assert "heads was read wrongly" in wrong
