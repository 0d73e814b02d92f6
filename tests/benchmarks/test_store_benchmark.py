"""The storage benchmark: every reader returns what was written, and wrong or missing readers are told apart."""

from __future__ import annotations

import importlib
import json
import mmap
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import RisError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/store.py` does
store, contract, flat, page_cache, report, timing = (
    importlib.import_module(name)
    for name in (
        "store",
        "layouts.contract",
        "layouts.flat",
        "layouts.page_cache",
        "layouts.report",
        "layouts.timing",
    )
)
sys.path.remove(str(BENCHMARKS))

NUM_IMAGES = 70  # one whole shard of 64, and a part of the next
LAYOUTS = {layout.name: layout for layout in store._all_layouts("cpu")}
BUILT_IN = [name for name, layout in LAYOUTS.items() if not layout.packages]
LOSSY = {"ris-zarr-bfloat16", "ris-zarr-bfloat16-decoded", "ris-zarr-int8", "ris-zarr-int8-decoded"}
COLD_WAYS = (
    "read",
    "prefetch",
    "prefetch past the page cache",
    "prefetch first-open",
    "prefetch first-open past the page cache",
)
OPTIONAL_SETS = ("litdata", "mds", "tensorstore", "tensorstore-pool", "tensorstore-memmap", "zarrs")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of tiny files are synced here, which is most of the time."""
    if "real_disk" not in request.fixturenames:
        monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def real_disk(tmp_path: Path) -> Path:
    """A directory whose files the page cache lets go of."""
    kind = report.describe_machine(tmp_path).file_system
    if kind in ("tmpfs", "ramfs") or not sys.platform.startswith("linux"):
        pytest.skip(f"{kind} lives in the page cache")
    return tmp_path


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("drawn") / "drawn.bin"
    return contract.draw_features(path, contract.SHAPES["tiny"], NUM_IMAGES, seed=3)


def run(*arguments: object) -> int:
    return store.main([str(argument) for argument in ("--shape", "tiny", *arguments)])


def opened(layout: Any, features: Any, root: Path, batch_size: int) -> Any:
    written = timing.write(layout, features, root)
    return layout.open(written.directory, features, batch_size)


def test_features_differ_between_images_and_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, again, other = (
        contract.draw_features(tmp_path / f"{number}", contract.SHAPES["tiny"], 5, seed)
        for number, seed in enumerate((0, 0, 1))
    )
    for name, array in first.arrays.items():
        assert array.dtype == np.float16
        assert np.isfinite(array).all()
        assert len(np.unique(array.reshape(5, -1), axis=0)) == 5
        np.testing.assert_array_equal(array, again.arrays[name])
        assert not np.array_equal(array, other.arrays[name])


def test_the_flat_file_holds_the_arrays_one_after_another(tmp_path: Path) -> None:
    drawn = contract.draw_features(tmp_path / "drawn.bin", contract.SHAPES["tiny"], 5, 0)
    expected = b"".join(array.tobytes() for array in drawn.arrays.values())
    assert drawn.num_bytes == len(expected)
    timing.write(flat.FLAT, drawn, tmp_path)
    assert (tmp_path / "flat" / "features.bin").read_bytes() == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_reader_returns_the_images_asked_for(name: str, features: Any, tmp_path: Path) -> None:
    """Compared with the drawn features alone, not with what the layout says it expects."""
    read = opened(LAYOUTS[name], features, tmp_path, batch_size=8)
    for images in ([69, 0, 63, 64, 0], [5], list(range(8))):
        batch = read(images)
        for feature, drawn in features.arrays.items():
            found = timing.as_numpy(batch, feature)
            assert found.shape == (len(images), *drawn.shape[1:])
            if name == "ris-zarr-int8":
                found = found * np.asarray(batch.get(f"{feature}_scale", 1))
            elif name == "ris-zarr-bfloat16":
                found = (found.astype(np.uint32) << 16).view(np.float32)
            if name in LOSSY:
                np.testing.assert_allclose(found, drawn[images].astype(np.float32), rtol=2**-8, atol=0.03)
            else:
                np.testing.assert_array_equal(found, drawn[images])


@pytest.mark.parametrize("damage", ["value", "type", "missing"])
def test_a_reader_of_wrong_values_stops_the_benchmark(damage: str, features: Any, tmp_path: Path) -> None:
    def open_wrong(directory: Path, shapes: Any, batch_size: int) -> Any:
        right = flat.FLAT.open(directory, shapes, batch_size)

        def read(images: Sequence[int]) -> Mapping[str, Any]:
            batch = {name: values.copy() for name, values in right(images).items()}
            if damage == "value" and 17 in images:
                batch["clip"][list(images).index(17), 3, 5] += 1
            elif damage == "type":
                batch["clip"] = batch["clip"].astype(np.float32)
            elif damage == "missing":
                del batch["clip"]
            return batch

        return read

    wrong = replace(flat.FLAT, name="wrong", open=open_wrong)
    with pytest.raises(RisError, match="wrong returned other values of clip") as caught:
        timing.measure([flat.FLAT, wrong], features, tmp_path, batch_size=8, rounds=1, seed=0)
    assert caught.value.facts["layout"] == "wrong"
    if damage == "value":
        assert 17 in caught.value.facts["images"]  # type: ignore[operator]


def test_the_ratio_is_the_ceilings_time_over_the_readers(
    features: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ceiling takes 1, 2 and 3 s an image in the three rounds, the other readers 2 and 4 times as long."""
    now = [0.0]

    def clock() -> float:
        now[0] += 1e-9  # writing must take some time
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", clock)

    def taking(times: float) -> Any:
        def open_(directory: Path, shapes: Any, batch_size: int) -> Any:
            read = flat.FLAT.open(directory, shapes, batch_size)

            def slow(images: Sequence[int]) -> Any:
                now[0] += times * round_seconds[0] * len(images)
                return read(images)

            return slow

        return replace(flat.FLAT, name=f"{times:g} times", open=open_)

    round_seconds = [1.0]

    def next_round(*arguments: Any) -> Any:
        round_seconds[0] = next(image_seconds)
        return draw_batches(*arguments)

    draw_batches = timing.draw_batches
    image_seconds = iter([1.0, 1.0, 2.0, 3.0])  # the first is the proof's order
    monkeypatch.setattr(timing, "draw_batches", next_round)
    monkeypatch.setattr(timing, "FLAT", taking(1))
    results = timing.measure([taking(2), taking(4)], features, tmp_path, batch_size=8, rounds=3, seed=0)
    ratios = [(result.worst, result.ratio, result.best) for result in results]
    assert ratios == [pytest.approx((0.5,) * 3), pytest.approx((0.25,) * 3)]
    assert [result.images_per_s for result in results] == pytest.approx([1 / 4, 1 / 8])
    assert [result.first_pass for result in results] == pytest.approx([1 / 2, 1 / 4])


@given(num_images=st.integers(1, 300), batch_size=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_round_reads_every_image_once(num_images: int, batch_size: int, seed: int) -> None:
    batches = timing.draw_batches(num_images, batch_size, np.random.default_rng(seed))
    assert Counter(image for batch in batches for image in batch) == Counter(range(num_images))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_a_layout_whose_package_is_absent_is_listed_not_measured(features: Any, tmp_path: Path) -> None:
    absent = replace(flat.FLAT, name="absent", packages=("no_such_package_anywhere",))
    results = timing.measure([flat.FLAT, absent], features, tmp_path, batch_size=8, rounds=1, seed=0)
    assert results[1].missing == "not installed: no_such_package_anywhere"
    assert "not installed: no_such_package_anywhere" in report.warm_table(results, markdown=False)[-1]


def test_a_package_that_fails_to_import_is_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed_package.py").write_text("import a_part_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    missing = timing.why_missing(replace(flat.FLAT, packages=("half_installed_package",)))
    assert missing == "cannot be imported: No module named 'a_part_that_is_not_there'"


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], list[Path]]:
    """Standard output, the JSON and what is left of the files, of one run with every layout and `--cold`."""
    root = tmp_path_factory.mktemp("run")
    (root / "files").mkdir()
    command = [
        sys.executable,
        str(BENCHMARKS / "store.py"),
        "--shape",
        "tiny",
        "--images",
        "70",
        "--batch",
        "8",
    ]
    command += ["--rounds", "1", "--cold", "--dir", str(root / "files"), "--json", str(root / "results.json")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads((root / "results.json").read_text()), list((root / "files").iterdir())


def test_the_table_and_the_json_have_a_row_for_every_layout(
    full_run: tuple[str, dict[str, Any], list[Path]],
) -> None:
    text, results, _ = full_run
    rows = {line.split()[0] for line in text.splitlines() if line}
    assert set(LAYOUTS) <= rows
    assert [row["name"] for row in results["warm"]] == list(LAYOUTS)
    for row in results["warm"]:
        if row["missing"] is None:
            figures = ("ratio", "images_per_s", "read_gb_per_s", "first_pass", "write_gb_per_s", "size")
            assert all(row[figure] > 0 for figure in figures), row
            assert 0 < row["resident"] <= 1
        else:
            assert row["name"] in OPTIONAL_SETS


def test_the_results_say_where_and_how_they_were_taken(
    full_run: tuple[str, dict[str, Any], list[Path]],
) -> None:
    text, results, _ = full_run
    assert results["command"].startswith("python benchmarks/store.py --shape tiny --images 70")
    assert results["command"] in text
    assert results["machine"]["libraries"]["numpy"] == np.__version__
    assert results["machine"]["cores"] >= 1
    assert results["image_bytes"] == 2 * (32 * 8 * 8 + 16 * 64 + 48)


def test_cold_reading_is_compared_with_sequential_reading(
    full_run: tuple[str, dict[str, Any], list[Path]],
) -> None:
    text, results, _ = full_run
    names = [row["name"] for row in results["cold"]]
    assert names[0] == "sequential"
    assert {f"ris-{backend} {way}" for backend in ("zarr", "hdf5") for way in COLD_WAYS} == set(names[1:])
    assert all(row["ratio"] > 0 and 0 <= row["kept"] <= 1 for row in results["cold"])
    kept = max(row["kept"] for row in results["cold"])
    assert ("mincore confirms" in text) == (kept <= 0.001)


def test_nothing_is_left_behind(full_run: tuple[str, dict[str, Any], list[Path]]) -> None:
    assert full_run[2] == []


def test_markdown_rows_have_the_columns_of_the_header(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--images", 4, "--rounds", 1, "--only", "npy,ris-zarr", "--markdown") == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert {line.split("|")[1].strip() for line in table[2:]} == {"flat-memmap", "npy", "ris-zarr"}


def test_cold_reading_measures_both_backends_whatever_only_says() -> None:
    options = store._parser().parse_args(["--cold", "--only", "npy"])
    assert [layout.name for layout in store._chosen(options)] == [
        "flat-memmap",
        "ris-zarr",
        "ris-hdf5",
        "npy",
    ]


def test_an_unknown_layout_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--only", "ris-zarr,lmdb") == 2
    message = capsys.readouterr().err
    assert "'lmdb'" in message
    assert "pickle-float32" in message


@pytest.mark.parametrize("option", ["--json", "--dir"])
def test_a_missing_directory_is_refused_before_anything_is_measured(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(option, tmp_path / "missing" / "there") == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_run_that_does_not_fit_is_refused(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if place == "memory":
        monkeypatch.setattr(store, "available_memory", lambda: 10_000)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    assert run("--images", 70) == 2
    message = capsys.readouterr().err
    assert place in message
    assert "--images" in message


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_counts_must_be_whole_numbers_above_zero(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--images", number)
    assert caught.value.code == 2
    assert "whole number above 0" in capsys.readouterr().err


def test_a_dropped_file_leaves_the_page_cache_unless_it_is_mapped(real_disk: Path) -> None:
    path = real_disk / "file"
    path.write_bytes(bytes(range(256)) * 4096)
    assert page_cache.resident_share([path]) == 1
    page_cache.drop([path])
    assert page_cache.resident_share([path]) == 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:].count(7) == 4096
        page_cache.drop([path])
        assert page_cache.resident_share([path]) == 1
    page_cache.drop([path])
    page_cache.fill([path])
    assert page_cache.resident_share([path]) == 1


def test_a_file_evicted_from_the_page_cache_makes_the_figures_suspect(features: Any, tmp_path: Path) -> None:
    (result,) = timing.measure([flat.FLAT], features, tmp_path, batch_size=8, rounds=1, seed=0)
    assert not any("Not warm" in line for line in report.warm_notes([result]))
    assert any("only 40%" in line for line in report.warm_notes([replace(result, resident=0.4)]))
