"""Text that users type or files hold neither crashes a command nor steers the terminal."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.render import print_table, printable

ODD = "red\x1b[2J\x07\r\x9b31m\u202eknil\u2066 \u05d0\u05d3\u05d5\u05dd \u2028 \U0001f600 [bold]"


def _steers(text: str) -> bool:
    return any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u2028" for c in text)


def test_letters_of_every_script_stay_and_what_steers_is_escaped():
    shown = printable("left אדום مرحبا 赤い é 👩\u200d🚀\nsecond\x1b[31m\u202e\udcff")
    assert shown == "left אדום مرحبا 赤い é 👩\u200d🚀\nsecond\\x1b[31m\\u202e\\udcff"


def test_what_the_encoding_lacks_is_escaped():
    assert printable("é ☃", "ascii") == "\\xe9 \\u2603"


@given(st.text(st.characters(codec=None)))
def test_any_text_can_be_printed_and_steers_nothing(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert not _steers(shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_table_of_odd_texts_is_printed(monkeypatch, encoding):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    print_table(ODD, ["what", "value"], [["\udcff", ODD]], caption=ODD)
    stdout.flush()
    written = stdout.buffer.getvalue().decode(encoding)
    assert not _steers(written)
    assert "red\\x1b[2J" in written
    assert "[bold]" in written


@pytest.mark.parametrize("as_json", [False, True])
def test_an_expression_of_odd_characters_is_predicted_and_shown(
    ris, drawn_data, tiny_runs, tmp_path, as_json
):
    image = sorted((drawn_data / "images" / "train2014").iterdir())[0]
    options = ["--json"] if as_json else []
    result = ris(
        "predict", "--image", image, "--text", ODD, "--out", tmp_path, "--runs", tiny_runs, "--device", "cpu", *options
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not _steers(result.stdout)
    assert as_json or "\\x1b[2J" in result.stdout


def test_an_error_does_not_let_an_escape_of_a_file_through(ris, drawn_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawn_data / "refcoco", data / "refcoco")
    path = data / "refcoco" / "instances.json"
    document = json.loads(path.read_text())
    for image in document["images"]:
        image["file_name"] = f"\x1b]0;title\x07\u202e{image['file_name']}"
    path.write_text(json.dumps(document))
    result = ris(
        "extract", "--split", "refcoco", "--data", data, "--cache", tmp_path / "c", "--preset", "tiny",
        "--random-weights", "--device", "cpu", "--strict",
    )  # fmt: skip
    assert result.exit_code == 3
    assert "\\x1b]0;title\\x07\\u202eCOCO" in result.stderr
    assert not _steers(result.stderr)


def test_odd_expressions_are_extracted_and_scored(ris, drawn_data, tiny_runs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawn_data, data)
    path = data / "refcoco" / "refs(unc).p"
    refs = [ref for ref in pickle.loads(path.read_bytes()) if ref["split"] == "val"]
    for ref in refs:
        for sentence in ref["sentences"]:
            sentence["raw"] = sentence["sent"] = ODD
    path.write_bytes(pickle.dumps(refs, protocol=2))
    cache = tmp_path / "cache"
    result = ris(
        "extract", "--split", "refcoco", "--data", data, "--cache", cache, "--preset", "tiny", "--random-weights",
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = ris(
        "eval", "--cache", cache, "--runs", tiny_runs, "--split", "refcoco:val", "--device", "cpu",
        "--save-predictions", tmp_path / "predictions.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not _steers(result.stdout)


def test_an_expression_that_is_no_text_is_refused(ris, tmp_path):
    result = ris("predict", "--image", tmp_path / "a.jpg", "--text", "red \udcff")
    assert result.exit_code == 2
    assert "no valid text: 'red \\udcff'" in result.stderr


def test_bytes_that_are_no_text_on_the_command_line_end_with_a_message(tmp_path):
    """Python hands them over as lone surrogates."""
    command = [
        sys.executable,
        "-m",
        "cli",
        "data",
        "synth",
        "--out",
        os.fsencode(tmp_path),
        "--layout",
        b"\xff\x1b[2J",
    ]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"\x1b[2J" not in done.stderr
