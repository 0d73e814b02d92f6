"""The commands and the example of docs/datasets.md run, in the order they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ris_cache.datasets.check.found import refs_paths
from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.json_lines import _LINE_KEYS
from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.selection import PUBLISHED_DATASETS, Selection

TEXT = (Path(__file__).parents[1] / "docs" / "datasets.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture
def birds(tmp_path) -> Path:
    """The custom dataset of the document, with its images and mask."""
    root = tmp_path / "data"
    (root / "custom" / "birds").mkdir(parents=True)
    (example,) = blocks("jsonl")
    (root / "custom" / "birds.jsonl").write_text(example, "utf-8")
    for name in ("1.jpg", "2.jpg"):
        Image.new("RGB", (160, 120)).save(root / "custom" / "birds" / name)
    mask = Image.new("L", (160, 120))
    mask.paste(255, (5, 5, 20, 20))
    mask.save(root / "custom" / "birds" / "1_second.png")
    return root


def test_every_command_runs(ris: Any, birds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(blocks("sh")).splitlines()
    assert len(lines) >= 4
    monkeypatch.chdir(tmp_path)
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "ris"
        result = ris(*words)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_custom_example_means_what_the_document_says(birds: Path) -> None:
    dataset = load_dataset(birds, "custom", "birds")
    assert [(e.split, e.target_kind) for e in dataset.expressions] == [
        ("train", "one"),
        ("train", "many"),
        ("val", "one"),
        ("val", "none"),
    ]
    # The same outline on the same image is one object.
    assert dataset.expressions[0].ann_ids[0] == dataset.expressions[1].ann_ids[0]
    assert [json.loads(line)["expression"] for line in blocks("jsonl")[0].splitlines()] == [
        e.raw for e in dataset.expressions
    ]


def test_the_table_of_keys_lists_each_key() -> None:
    section = TEXT.partition("## A dataset of your own")[2]
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", section, re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(_LINE_KEYS)


def test_the_layout_names_every_file_and_folder_that_is_searched() -> None:
    tree = TEXT.partition("## Layout")[2].partition("\n## ")[0]
    for dataset, split_bys in PUBLISHED_DATASETS.items():
        for split_by in split_bys:
            for path in refs_paths(Path(), Selection(dataset=dataset, split_by=split_by)):
                assert path.name in tree
                assert f"{path.parent}/" in tree
    roots = ImageRoots(Path())
    for folder in roots.directories_for("COCO_train2014_000000000009.jpg"):
        assert f"`{folder.as_posix()}`" in tree
    replaced = [folder.as_posix().replace("train2014", "val2014") if "trainval" not in folder.name else folder.as_posix()
                for folder in roots.directories_for("COCO_train2014_000000000009.jpg")]  # fmt: skip
    assert [
        folder.as_posix() for folder in roots.directories_for("COCO_val2014_000000000042.jpg")
    ] == replaced


def test_every_dataset_and_split_by_has_its_source() -> None:
    table = TEXT.partition("## Where the files come from")[2].partition("\n\nCOCO's")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("| ")
    ]
    found = {row[0].lower(): re.findall(r"`(\w+)`", row[1]) for row in rows[1:]}
    assert found == {name: list(split_bys) for name, split_bys in PUBLISHED_DATASETS.items()}
