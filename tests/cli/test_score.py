"""`ris eval --rules --save-predictions` and `ris score`: the same numbers, and what they mean beside them."""

from __future__ import annotations

import json
import shutil

import pytest

from ris_train.scoring import RULES
from ris_train.scoring.samples import SampleTable


@pytest.fixture(scope="module")
def gres(tmp_path_factory, ris):
    """Data, cache and two runs of one step on a drawn gRefCOCO: `plain`, and `head` with a no-target head."""
    root = tmp_path_factory.mktemp("gres")
    data, cache, runs = root / "data", root / "feats", root / "runs"
    steps = [
        ("data", "synth", "--out", data, "--layout", "grefcoco", "--train", 6, "--val", 4, "--test", 2, "--seed", 1),
        ("extract", "--split", "grefcoco", "--data", data, "--cache", cache, "--preset", "tiny",
         "--random-weights", "--device", "cpu"),
    ]  # fmt: skip
    for name, has_head in (("plain", "false"), ("head", "true")):
        steps.append(
            ("train", "--cache", cache, "--runs", runs, "--run", name, "--random-weights", "--device", "cpu",
             "--set", "data.train=grefcoco:train", "--set", "data.val=grefcoco:val", "--set", "train.steps=1",
             "--set", "train.batch_size=4", "--set", "train.val_samples=4",
             "--set", f"model.no_target_head={has_head}")
        )  # fmt: skip
    for step in steps:
        result = ris(*step)
        assert result.exit_code == 0, result.output
    return {"data": data, "cache": cache, "runs": runs}


def evaluate(ris, gres, run, *options):
    result = ris(
        "eval", "--cache", gres["cache"], "--runs", gres["runs"], "--run", run, "--device", "cpu", *options
    )
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("run", ["plain", "head"])
@pytest.mark.parametrize("source", ["cache", "data"])
def test_scoring_saved_predictions_gives_the_numbers_of_the_evaluation(ris, gres, tmp_path, run, source):
    """To the last digit, by every rule set, from the cache's tables and from the dataset's files."""
    saved = tmp_path / "p.json"
    split = ("--split", "grefcoco:val,grefcoco:testA", "--rules", "all", "--json")
    own = json.loads(evaluate(ris, gres, run, *split, "--save-predictions", saved).stdout)
    result = ris("score", "--predictions", saved, f"--{source}", gres[source], *split)
    assert result.exit_code == 0, result.output
    scored = json.loads(result.stdout)
    assert scored["results"] == own["results"]
    assert scored["weights"] == own["weights"]
    (table,) = (SampleTable.read(path) for path in scored["files"] if path.endswith("parquet"))
    (path,) = (gres["runs"] / run / "eval").glob("*val+*testA.parquet")
    original = SampleTable.read(path)
    assert table.key == original.key
    assert all(list(table.columns[name]) == list(original.columns[name]) for name in original.columns)
    assert bool(table.columns["has_head"][0]) is (run == "head")


@pytest.mark.parametrize("target", ["p.npz", "pngs"])
def test_other_forms_give_the_same_numbers_on_the_original_grid(ris, gres, tmp_path, target):
    options = ("--split", "grefcoco:val", "--rules", "gres,lisa", "--json")
    own = json.loads(evaluate(ris, gres, "plain", *options, "--save-predictions", tmp_path / target).stdout)
    result = ris("score", "--predictions", tmp_path / target, "--cache", gres["cache"], *options)
    assert result.exit_code == 0, result.output
    (expected,), (found,) = own["results"], json.loads(result.stdout)["results"]
    for rules in ("gres", "lisa"):
        metrics = RULES[rules].metrics
        assert {name: found["scores"][rules][name] for name in metrics} == {
            name: expected["scores"][rules][name] for name in metrics
        }
        assert found["scores"][rules]["threshold"] == "as predicted"


def test_every_table_says_what_its_numbers_mean_and_why_some_are_missing(ris, gres):
    printed = " ".join(
        evaluate(ris, gres, "plain", "--rules", "ris,gres,cris", "--split", "grefcoco:val").stdout.split()
    )
    for words in (
        "grefcoco.unc:val", "polygons on the grid", "overlapping parts", "union", "logit > 0",
        "category source: none", "weights: sam random(seed=0)", "│ ris │ – │ – │",
        "ris: no rule for no-target samples, of which there are",
    ):  # fmt: skip
        assert words in printed, words


def test_one_rule_set_is_explained_below_its_table(ris, gres):
    printed = " ".join(
        evaluate(ris, gres, "head", "--rules", "rela", "--split", "grefcoco:val").stdout.split()
    )
    assert (
        "rules: rela · grid: 480 · ground truth: polygons on the grid · overlapping parts: union" in printed
    )


def test_an_unknown_rule_set_is_refused_with_the_nearest(ris, gres):
    result = ris("eval", "--cache", gres["cache"], "--runs", gres["runs"], "--rules", "dfma")
    assert result.exit_code == 2
    assert "Did you mean dfam?" in result.stderr


def test_predictions_that_do_not_match_end_with_exit_code_3_and_examples(ris, gres, tmp_path):
    saved = tmp_path / "p.json"
    evaluate(ris, gres, "plain", "--split", "grefcoco:val", "--save-predictions", saved)
    document = json.loads(saved.read_text())
    first, *others = document["predictions"]
    saved.write_text(json.dumps({"predictions": [*others, others[0]]}))
    common = ("score", "--predictions", saved, "--split", "grefcoco:val", "--cache", gres["cache"])
    result = ris(*common)
    assert result.exit_code == 3
    assert f"1 missing (({first['ref_id']}, {first['sent_id']}))" in result.stderr
    assert f"1 duplicate (({others[0]['ref_id']}, {others[0]['sent_id']}))" in result.stderr
    saved.write_text(json.dumps(others))
    allowed = ris(*common, "--allow-missing")
    assert allowed.exit_code == 0, allowed.output
    assert "1 samples without a prediction scored as empty masks" in allowed.stderr


def test_results_go_where_they_are_asked_for_under_the_name_given(ris, gres, tmp_path):
    saved = tmp_path / "p.json"
    evaluate(ris, gres, "plain", "--split", "grefcoco:testA,grefcoco:testB", "--save-predictions", saved)
    result = ris(
        "score", "--predictions", saved, "--split", "grefcoco:testB", "--cache", gres["cache"],
        "--name", "ours", "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "ours.scores.json",
        "ours.samples.parquet",
    }
    assert "predictions are of samples not asked for" in result.stderr
    assert SampleTable.read(tmp_path / "out" / "ours.samples.parquet").metadata["method"] == "ours"


def test_ground_truth_needs_no_cache(ris, gres, tmp_path, monkeypatch):
    saved = tmp_path / "p.npz"
    evaluate(ris, gres, "plain", "--split", "grefcoco:val", "--save-predictions", saved)
    alone = tmp_path / "elsewhere"
    shutil.copytree(gres["data"], alone / "data")
    monkeypatch.chdir(alone)
    result = ris("score", "--predictions", saved, "--split", "grefcoco:val", "--data", "data")
    assert result.exit_code == 0, result.output


def test_a_table_over_a_part_of_a_split_says_so(ris, drawn_data, tmp_path):
    extracted = ris(
        "extract", "--split", "refcoco:val", "--data", drawn_data, "--cache", tmp_path / "part",
        "--preset", "tiny", "--random-weights", "--device", "cpu", "--limit", 1,
    )  # fmt: skip
    assert extracted.exit_code == 0, extracted.output
    (tmp_path / "p.json").write_text("[]")
    command = ("score", "--predictions", tmp_path / "p.json", "--split", "refcoco:val", "--allow-missing")
    result = ris(*command, "--cache", tmp_path / "part")
    assert result.exit_code == 0, result.output
    assert "refcoco.unc:val (a part: the cache does not hold all of it)" in " ".join(result.stdout.split())
    assert "a part" not in ris(*command, "--data", drawn_data).stdout


def test_a_place_that_cannot_take_predictions_is_refused_before_the_evaluation(ris, gres, tmp_path):
    for target in (tmp_path / "p.csv", tmp_path):
        (tmp_path / "full.png").touch()
        result = ris("eval", "--cache", gres["cache"], "--runs", gres["runs"], "--save-predictions", target)
        assert result.exit_code == 2, result.output
