"""Histograms count every sample once and are drawn to the same bytes each time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ris_cache.errors import ConfigError
from ris_train.compare.comparison import compare
from ris_train.compare.histogram import count_histograms, draw_histograms
from ris_train.compare.methods import published_row
from ris_train.scoring.rules import RULES

SPLITS = {("grefcoco.unc", "val"): 20, ("grefcoco.unc", "testA"): 10}


@pytest.fixture(scope="module")
def comparison(make_table, method_of):
    tables = [make_table(seed, SPLITS, no_target=0.3, has_head=True) for seed in (1, 2)]
    return compare(
        [method_of("_under$core^$", tables[0]), method_of("b", tables[1]), published_row("ours")],
        num_resamples=0,
    )


def test_a_right_no_target_counts_as_1_and_nobody_is_lost(comparison):
    first, _ = count_histograms(comparison, num_bins=10)
    assert first.title == "gRefCOCO val"
    assert list(first.counts) == ["_under$core^$ (category source: none)", "b (category source: none)"]
    for index, counts in enumerate(first.counts.values()):
        table = comparison.by_rules["gres"][0].paired.tables[index]
        assert counts.sum() == len(table) == first.num_samples
        right = np.sum(table.columns["is_no_target"] & table.columns["says_no_target"])
        ious = RULES["gres"].sample_ious(table.counts("original"))
        assert counts[-1] == np.sum(ious >= 0.9) >= right > 0


def test_samples_on_an_edge_belong_to_the_bin_above_it(make_table, method_of):
    table = make_table(1, {("refcoco.unc", "val"): 10})
    exact = np.resize(np.arange(0, 21), len(table))
    columns = dict(table.columns)
    columns["G:original"] = np.full(len(table), 20)
    columns["P:original"] = columns["I:original"] = exact
    from dataclasses import replace

    made = compare([method_of("a", replace(table, columns=columns))], num_resamples=0)
    (histogram,) = count_histograms(made, num_bins=20)
    (counts,) = histogram.counts.values()
    places = np.minimum(exact, 19)
    assert counts.tolist() == np.bincount(places, minlength=20).tolist()


def test_samples_without_iou_are_said_apart(make_table, method_of):
    table = make_table(1, {("ref-zom.final", "test"): 20}, no_target=0.5, views=("480-nearest",))
    (histogram,) = count_histograms(compare([method_of("a", table)], num_resamples=0))
    assert histogram.rules == "zom"
    assert histogram.num_without == int(table.columns["is_no_target"].sum()) > 0
    (counts,) = histogram.counts.values()
    assert counts.sum() + histogram.num_without == histogram.num_samples


def test_the_svg_has_the_same_bytes_whatever_the_users_style(comparison, tmp_path):
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    draw_histograms(count_histograms(comparison), one)
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):  # a user's own style
        draw_histograms(count_histograms(comparison), other)
    assert one.read_bytes() == other.read_bytes()
    text = one.read_text()
    assert "<dc:date>" not in text
    assert not re.search(r"20\d\d-\d\d-\d\d", text)


def test_the_png_is_a_picture_with_both_colours(comparison, tmp_path):
    path = tmp_path / "iou.png"
    draw_histograms(count_histograms(comparison), path)
    with Image.open(path) as image:
        assert image.info.keys() <= {"dpi"}
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert pixels.shape[0] > 500_000
    for colour in ((0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)):
        assert (pixels == colour).all(axis=1).sum() > 1000


def test_more_methods_than_colours_are_hatched(make_table, method_of, tmp_path):
    table = make_table(1)
    methods = [method_of(f"method {number}", table) for number in range(10)]
    draw_histograms(count_histograms(compare(methods, num_resamples=0), num_bins=10), tmp_path / "many.svg")
    assert (tmp_path / "many.svg").read_text().count("<pattern") == 2


def test_published_rows_alone_have_no_histogram():
    with pytest.raises(ConfigError, match="no samples for a histogram"):
        count_histograms(compare([published_row("ours")]))


def test_other_bins_and_suffixes_are_refused(comparison, tmp_path):
    with pytest.raises(ConfigError, match="10 or 20 bins; got 15"):
        count_histograms(comparison, num_bins=15)
    with pytest.raises(ConfigError, match=r"\.svg or \.png; got .*x\.pdf"):
        draw_histograms(count_histograms(comparison), tmp_path / "x.pdf")


def test_without_matplotlib_the_extra_is_named(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'ris\[plots\]'"):
        draw_histograms(count_histograms(comparison), tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()


def test_comparing_loads_neither_matplotlib_nor_torch():
    program = "import sys, ris_train.compare; print(*{'matplotlib', 'torch'} & set(sys.modules))"
    finished = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert finished.stdout.split() == []
