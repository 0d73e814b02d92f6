"""Shared models: a folder gives back the very model, damage is refused, and the hub is met at its edge."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import ris_train.pretrained
from ris_cache.errors import CheckpointError, ConfigError, RisError
from ris_train.checkpoint import load_checkpoint
from ris_train.model_card import ModelRecord, ReportedScore, TrainedOn, render_card
from ris_train.pretrained import RISModel, export
from ris_train.run import RunDirectory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(
    tiny_runs: Path, tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory, ris: Callable[..., Any]
) -> RunDirectory:
    """A copy of the trained run, evaluated on testA."""
    path = tmp_path_factory.mktemp("shared") / "first"
    shutil.copytree(tiny_runs / "first", path, ignore=shutil.ignore_patterns("eval"))
    options = ("--split", "refcoco:testA", "--rules", "ris,lavt", "--device", "cpu")
    result = ris("eval", "--cache", tiny_cache, "--runs", path.parent, "--run", "first", *options)
    assert result.exit_code == 0, result.output
    return RunDirectory(path)


@pytest.fixture(scope="module")
def exported(run: RunDirectory) -> Path:
    """The run's model as a folder."""
    return export(run)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def tensors_are_equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    state = second.state_dict()
    return state.keys() == first.state_dict().keys() and all(
        torch.equal(tensor, state[name]) for name, tensor in first.state_dict().items()
    )


def test_a_folder_holds_what_its_docstring_says(exported: Path, run: RunDirectory) -> None:
    assert exported == run.path / "pretrained" / "best"
    assert {path.name for path in exported.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer",
        "README.md",
    }
    document = json.loads((exported / "config.json").read_text())
    assert (document["format"], document["format_version"]) == ("ris-model", 1)
    assert set(document["files"]) == {
        path.relative_to(exported).as_posix()
        for path in exported.rglob("*")
        if path.is_file() and path.name not in ("README.md",) and path != exported / "config.json"
    }


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_what_is_loaded_is_the_checkpoint_to_the_last_bit(
    run: RunDirectory, tmp_path: Path, checkpoint: str
) -> None:
    network, metadata = load_checkpoint(run.checkpoint_path(checkpoint), device=CPU)
    model = RISModel.from_pretrained(export(run, checkpoint, tmp_path / "there"))
    assert tensors_are_equal(network, model.network)
    assert model.metadata == metadata
    assert not model.network.training
    text = ["the red circle at the left"]
    ours, theirs = RISModel.from_run(run, checkpoint).tokenizer.encode(text), model.tokenizer.encode(text)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_saving_what_was_loaded_gives_the_same_files(exported: Path, tmp_path: Path) -> None:
    again = RISModel.from_pretrained(str(exported)).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (again / name).read_bytes() == (exported / name).read_bytes()


def test_the_record_names_training_data_and_scores_of_this_very_checkpoint(run: RunDirectory) -> None:
    record = RISModel.from_run(run).record
    assert [(part.selection, part.images) for part in record.trained_on] == [("refcoco.unc:train", 24)]
    assert record.trained_on[0].expressions > 24
    found = [(score.measured, score.split, score.rules) for score in record.scores]
    assert found == [
        ("training", "refcoco:val", "ris"),
        ("ris eval", "refcoco.unc:testA", "ris"),
        ("ris eval", "refcoco.unc:testA", "lavt"),
    ]
    assert {score.category_source for score in record.scores} == {"none"}
    assert all(score.num_samples > 0 for score in record.scores)
    (document,) = [json.loads(path.read_text()) for path in (run.path / "eval").glob("*.json")]
    assert record.scores[1].values["oIoU"] == document["results"][0]["scores"]["ris"]["oIoU"]


def test_evaluations_of_another_checkpoint_are_left_out(run: RunDirectory, tmp_path: Path) -> None:
    """`last` was not evaluated; and an evaluation of `best` is of the best of its time, whatever its step."""
    last = RISModel.from_run(run, "last")
    assert {score.measured for score in last.record.scores} == {"training"}
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    (path,) = (copy.path / "eval").glob("*.json")
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"checkpoint_sha256": "0" * 64}))
    assert {score.measured for score in RISModel.from_run(copy).record.scores} == {"training"}


def test_a_run_that_recorded_little_can_be_shared(run: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(Path(shutil.copytree(run.path, tmp_path / "copy")))
    shutil.rmtree(copy.path / "eval")
    copy.metrics_path.unlink()
    (copy.path / "env.json").write_text("damaged")
    folder = export(copy, "best", tmp_path / "model")
    record = RISModel.from_pretrained(folder).record
    assert (record.trained_on, record.scores) == ((), ())
    card = (folder / "README.md").read_text()
    assert "Not recorded." in card
    assert "Not evaluated." in card


def test_the_card_says_what_a_reader_must_know(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    record = RISModel.from_pretrained(exported).record
    facts = huggingface_hub.ModelCard.load(exported / "README.md").data
    assert (facts.library_name, facts.pipeline_tag, facts.license) == ("ris", "image-segmentation", "unknown")
    assert facts.tags == ["clip", "model_hub_mixin", "referring-image-segmentation", "segment-anything"]
    assert "**Not chosen yet.**" in card
    assert record.checkpoint.fingerprint in card
    assert "| arithmetic of the features | float32 |" in card
    assert "random(seed=0)" in card
    assert "`refcoco.unc:train`" in card
    for score in record.scores:
        value = score.values["oIoU"]
        assert value is not None
        (row,) = [
            line
            for line in card.splitlines()
            if line.startswith(f"| `{score.split}` | {score.rules} | {score.grid} | {score.threshold} |")
        ]
        assert f"| {score.num_samples} | none | own | {score.measured} | {100 * value:.2f} |" in row


def test_a_licence_replaces_the_placeholder(exported: Path, tmp_path: Path) -> None:
    folder = RISModel.from_pretrained(exported).save_pretrained(tmp_path / "m", licence="cc-by-4.0")
    card = (folder / "README.md").read_text()
    assert huggingface_hub.ModelCard(card).data.license == "cc-by-4.0"
    assert "Not chosen yet" not in card
    assert "`cc-by-4.0`" in card


@pytest.mark.parametrize("licence", ["no", "1.0", "a: b", "mine\n---\ntags: [x]"])
def test_a_licence_of_any_text_stays_the_licence_and_nothing_else(exported: Path, licence: str) -> None:
    record = RISModel.from_pretrained(exported).record
    facts = huggingface_hub.ModelCard(render_card(record, licence=licence)).data
    assert facts.license == licence
    assert "x" not in facts.tags


def test_scores_that_are_undefined_are_dashes_and_bars_do_not_break_a_table(exported: Path) -> None:
    record = RISModel.from_pretrained(exported).record
    score = ReportedScore(
        split="custom.a|b:val",
        rules="ris",
        grid="original",
        threshold=0.5,
        num_samples=1,
        category_source="none",
        expressions="own",
        values={"oIoU": None},
        measured="ris eval",
    )
    changed = record.model_copy(
        update={"scores": (score,), "trained_on": (TrainedOn(selection="a\nb", expressions=1, images=1),)}
    )
    card = render_card(changed, licence="unknown")
    assert "| `custom.a\\|b:val` |" in card
    assert card.count("| – |") == 1
    assert "| `a b` | 1 | 1 |" in card


def test_the_card_of_a_run_that_overfits_does_not_claim_the_whole_training_set(exported: Path) -> None:
    record = RISModel.from_pretrained(exported).record
    total = sum(part.expressions for part in record.trained_on)

    def card(overfit: int | None) -> str:
        config = record.checkpoint.config
        train = config.train.model_copy(update={"overfit": overfit})
        changed = record.checkpoint.model_copy(update={"config": config.model_copy(update={"train": train})})
        return render_card(record.model_copy(update={"checkpoint": changed}), licence="unknown")

    whole = card(None)
    assert "the first" not in whole
    assert "is on the expressions by which the run's best checkpoint was chosen" in whole
    assert "Only the first 8 expressions of the training set were used" in card(8)
    assert "is on the expressions that it was trained on" in card(8)
    assert "Only the first" not in card(total), "there are no more than these"


def test_a_score_over_nothing_survives_the_record(exported: Path) -> None:
    record = RISModel.from_pretrained(exported).record
    checkpoint = record.checkpoint.model_copy(update={"val": {"oIoU": float("nan")}})
    text = record.model_copy(update={"checkpoint": checkpoint}).model_dump_json()
    val = ModelRecord.model_validate_json(text).checkpoint.val
    assert val["oIoU"] != val["oIoU"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_file_that_is_not_the_one_described_is_refused(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    match damage:
        case "changed":
            path.write_bytes(content)
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "missing":
            path.unlink()
    with pytest.raises(CheckpointError, match=path.name) as caught:
        RISModel.from_pretrained(folder)
    assert "again" in str(caught.value)
    assert caught.value.exit_code == 3


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format"),
        ({"format_version": 2}, "format_version"),
        ({"extra": 1}, "extra"),
        ({"files": {}}, "names no files"),
        ({"files": {"../model.safetensors": "00"}}, "not a plain relative path"),
        ({"files": {"tokenizer/tokenizer.json": "00"}}, "model.safetensors is not among them"),
    ],
)
def test_a_record_that_this_version_does_not_read_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        RISModel.from_pretrained(edited(folder, **changes))


def test_weights_of_another_model_are_refused_by_name(folder: Path) -> None:
    """With the right digest, as somebody who edits both would leave it."""
    import hashlib

    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    files = json.loads((folder / "config.json").read_text())["files"]
    edited(folder, files=files | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        RISModel.from_pretrained(folder)
    path.write_bytes(b"no safetensors")
    edited(folder, files=files | {path.name: hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(CheckpointError, match="no safetensors file"):
        RISModel.from_pretrained(folder)


def test_a_folder_without_a_model_says_so_and_a_run_says_how_to_export_it(
    run: RunDirectory, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        RISModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"training run.*--run.*`ris runs export`"):
        RISModel.from_pretrained(run.path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RISModel.from_pretrained(tmp_path)


def test_an_export_is_there_whole_or_not_at_all(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the last file comes; then there is room, and an empty folder to write into."""
    out = tmp_path / "models" / "first"

    def full(record: ModelRecord, *, licence: str) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ris_train.pretrained, "render_card", full)
        with pytest.raises(OSError, match="No space left"):
            export(run, "best", out)
        assert list(out.parent.iterdir()) == []
        out.mkdir()
        with pytest.raises(OSError, match="No space left"):
            export(run, "best", out)
        assert list(out.rglob("*")) == []
    assert export(run, "best", out) == out
    assert [path.name for path in out.parent.iterdir()] == ["first"]
    assert RISModel.from_pretrained(out).record.name == "first"


def test_the_working_directory_can_be_exported_into_and_stays_where_it_is(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaced by another directory of its name, it would be gone under the shell that is in it."""
    monkeypatch.chdir(tmp_path)
    before = tmp_path.stat().st_ino
    assert export(RunDirectory(run.path.resolve()), "best", Path()) == Path()
    assert tmp_path.stat().st_ino == Path().stat().st_ino == before
    assert RISModel.from_pretrained(Path()).record.name == "first"


@pytest.mark.parametrize("what", ["a file in it", "a file of its name"])
def test_an_export_is_never_written_over_anything(run: RunDirectory, tmp_path: Path, what: str) -> None:
    path = tmp_path / "model" / "mine.txt"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is not empty" if what == "a file in it" else "is a file"):
        export(run, "best", path.parent if what == "a file in it" else path)
    assert [found.name for found in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_a_model_is_never_written_over_something_else(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(CheckpointError, match="does not describe a model"):
        RISModel.from_pretrained(exported).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "tokenizer/vocab.txt"])
def test_without_a_model_in_a_folder_no_file_of_it_is_written_over(
    exported: Path, tmp_path: Path, name: str
) -> None:
    """As `save_pretrained(".")` would in a project."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"belong to no model of ris: {re.escape(name)}"):
        RISModel.from_pretrained(exported).save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_a_file_beside_the_tokenizer_of_a_model_is_told_of_before_anything_is_written(
    exported: Path, folder: Path
) -> None:
    """It would be read with the new model, which no one could load then."""
    (folder / "tokenizer" / "mine.json").write_text("{}")
    (folder / "README.md").write_text("as it was")
    with pytest.raises(ConfigError, match=r"tokenizer/mine\.json"):
        RISModel.from_pretrained(exported).save_pretrained(folder)
    assert (folder / "README.md").read_text() == "as it was"


def test_writing_over_a_model_leaves_none_of_its_files(exported: Path, folder: Path) -> None:
    """The earlier tokenizer had a file more, and a file of the user's lies beside it."""
    import hashlib

    (folder / "tokenizer" / "added.json").write_text("{}")
    files = json.loads((folder / "config.json").read_text())["files"]
    edited(folder, files=files | {"tokenizer/added.json": hashlib.sha256(b"{}").hexdigest()})
    (folder / "notes.txt").write_text("mine")
    RISModel.from_pretrained(folder).save_pretrained(folder)
    assert not (folder / "tokenizer" / "added.json").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert tensors_are_equal(
        RISModel.from_pretrained(folder).network, RISModel.from_pretrained(exported).network
    )


def test_a_hub_name_is_fetched_by_revision_and_nothing_but_the_model(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def stand_in(repo_id: str, **settings: Any) -> str:
        asked.append((repo_id, settings))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    model = RISModel.from_pretrained("someone/ris-tiny", revision="v1")
    assert model.record.name == "first"
    ((repo_id, settings),) = asked
    assert (repo_id, settings["revision"]) == ("someone/ris-tiny", "v1")
    assert settings["allow_patterns"] == [
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer/*.json",
        "tokenizer/vocab.txt",
    ]
    assert {name: value for name, value in settings.items() if value} == {
        "revision": "v1",
        "allow_patterns": settings["allow_patterns"],
    }


def test_the_mixins_keywords_of_fetching_reach_the_hub(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching: dict[str, Any] = {
        "token": "secret",
        "cache_dir": tmp_path,
        "local_files_only": True,
        "force_download": True,
    }
    asked: dict[str, Any] = {}

    def stand_in(repo_id: str, **settings: Any) -> str:
        asked.update(settings)
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    model = RISModel.from_pretrained("someone/ris-tiny", device="cpu", **fetching)
    assert {name: asked[name] for name in fetching} == fetching
    assert "secret" not in model.record.model_dump_json()
    with pytest.raises(TypeError, match="local_file_only"):
        RISModel.from_pretrained("someone/ris-tiny", local_file_only=True)  # type: ignore[call-arg]


def test_what_was_not_fetched_before_is_not_there_without_asking(tmp_path: Path) -> None:
    """The real client, which asks nobody."""
    with pytest.raises(CheckpointError, match=r"could be had from the hub: \S.*\.$"):
        RISModel.from_pretrained("someone/model", cache_dir=tmp_path, local_files_only=True)


def test_what_the_hub_refuses_is_told_by_its_reason_without_status_and_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(repo_id: str, **settings: Any) -> str:
        lines = "404 Client Error. (Request ID: Root=1)", "", f"Repository Not Found: {repo_id}.", "Log in."
        raise OSError("\n".join(lines))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"from the hub: Repository Not Found: someone/model\.$"):
        RISModel.from_pretrained("someone/model")


def test_a_hub_that_cannot_be_reached_is_said_so_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client, towards a port of this machine where nobody listens."""
    closed = functools.partial(
        huggingface_hub.snapshot_download, endpoint="http://127.0.0.1:9", cache_dir=tmp_path
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", closed)
    with pytest.raises(CheckpointError, match=r"no folder someone/model, and no model .* at v2: ") as caught:
        RISModel.from_pretrained("someone/model", revision="v2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./missing", "/nowhere/model", "a/b/c", "../x", ""])
def test_a_path_that_is_no_folder_never_reaches_the_hub(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _never)
    with pytest.raises(CheckpointError):
        RISModel.from_pretrained(name)
    with pytest.raises(CheckpointError, match="There is no model at"):
        RISModel.from_pretrained(tmp_path / "missing")


def test_a_local_folder_has_no_revision(exported: Path) -> None:
    with pytest.raises(ConfigError, match="has no revisions"):
        RISModel.from_pretrained(exported, revision="main")


class HubStandIn:
    """Takes the place of the two calls that upload; keeps what was sent."""

    def __init__(self, token: str | None = None) -> None:
        HubStandIn.last = self
        self.token = token
        self.created: list[tuple[str, dict[str, Any]]] = []
        self.sent: dict[str, bytes] = {}
        self.settings: dict[str, Any] = {}

    last: HubStandIn

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        self.created.append((repo_id, settings))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, folder_path: str, **settings: Any) -> Any:
        root = Path(folder_path)
        self.settings = settings
        self.sent = {
            path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        self.root = root
        return SimpleNamespace(commit_url="https://hub/commit/1")


def test_pushing_uploads_the_folder_that_saving_writes(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", HubStandIn)
    model = RISModel.from_pretrained(exported)
    assert model.push_to_hub("someone/ris-tiny", token="secret", licence="mit") == "https://hub/commit/1"
    hub = HubStandIn.last
    assert hub.token == "secret"
    assert hub.created == [("someone/ris-tiny", {"private": True, "exist_ok": True})]
    assert hub.settings == {
        "repo_id": "someone/ris-tiny",
        "commit_message": f"first, step {model.metadata.step}",
        "revision": None,
        "create_pr": False,
        "delete_patterns": ["tokenizer/*"],
    }
    saved = model.save_pretrained(tmp_path / "saved", licence="mit")
    assert hub.sent == {
        path.relative_to(saved).as_posix(): path.read_bytes() for path in saved.rglob("*") if path.is_file()
    }
    assert not any(b"secret" in content for content in hub.sent.values())
    assert not hub.root.exists(), "the folder was for the upload alone"


def test_the_mixins_keywords_of_uploading_reach_the_hub(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", HubStandIn)
    settings: dict[str, Any] = {"commit_message": "mine", "create_pr": True}
    RISModel.from_pretrained(exported).push_to_hub(
        "ris-tiny", branch="next", private=False, delete_patterns="*.bin", **settings
    )
    hub = HubStandIn.last
    assert hub.created == [("ris-tiny", {"private": False, "exist_ok": True})]
    assert hub.settings == settings | {
        "repo_id": "me/ris-tiny",
        "revision": "next",
        "delete_patterns": ["tokenizer/*", "*.bin"],
    }


def test_saving_can_push_and_leaves_other_files_of_the_folder_here(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", HubStandIn)
    model = RISModel.from_pretrained(exported)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    url = model.save_pretrained(tmp_path / "mine", licence="mit", push_to_hub=True, token="secret")
    hub = HubStandIn.last
    assert (url, hub.token) == ("https://hub/commit/1", "secret")
    assert hub.created == [("mine", {"private": True, "exist_ok": True})]
    assert hub.sent.keys() == {
        path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()
    }
    assert hub.sent["README.md"] == (tmp_path / "mine" / "README.md").read_bytes()
    assert (
        model.save_pretrained(tmp_path / "mine", repo_id="someone/else", branch="next") == tmp_path / "mine"
    )
    assert HubStandIn.last is hub, "nothing was asked for"


@pytest.mark.parametrize("keyword", ["license", "config", "allow_patterns"])
def test_a_keyword_that_saving_does_not_know_is_an_error_before_anything_is_written(
    exported: Path, tmp_path: Path, keyword: str
) -> None:
    with pytest.raises(TypeError, match=keyword):
        RISModel.from_pretrained(exported).save_pretrained(tmp_path / "m", **{keyword: "mit"})
    assert not (tmp_path / "m").exists()


def test_a_transfer_that_breaks_off_says_of_which_file_and_why(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(HubStandIn):
        def upload_folder(self, *, folder_path: str, **settings: Any) -> Any:
            raise RuntimeError("Error while uploading 'model.safetensors'.") from OSError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "HfApi", Broken)
    with pytest.raises(
        RisError, match=r"Error while uploading 'model\.safetensors' \(reset by peer\)\. Check"
    ):
        RISModel.from_pretrained(exported).push_to_hub("someone/model")


def test_a_model_is_one_of_the_hubs_mixin_and_says_the_same_as_its_card(exported: Path) -> None:
    model = RISModel.from_pretrained(exported)
    assert isinstance(model, huggingface_hub.ModelHubMixin)
    facts = huggingface_hub.ModelCard.load(exported / "README.md").data.to_dict()
    assert model._hub_mixin_info.model_card_data.to_dict() == {
        name: value for name, value in facts.items() if name != "license"
    }
    assert str(model.generate_model_card()) == (exported / "README.md").read_text()
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.record = model.record  # type: ignore[misc]
    assert dataclasses.replace(model).network is model.network
    assert copy.copy(model).record == model.record


def test_the_mixins_own_methods_write_and_read_the_very_same_model(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As code calls them that knows nothing of ris; older ones hand on two keywords more."""
    mixin = huggingface_hub.ModelHubMixin
    model = RISModel.from_pretrained(exported)
    mixin.save_pretrained(model, tmp_path / "again")
    for path in exported.rglob("*"):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(exported)).read_bytes() == path.read_bytes()
    read = vars(mixin)["from_pretrained"].__func__
    for more in ({}, {"proxies": None, "resume_download": None}):
        again = read(RISModel, str(tmp_path / "again"), device="cpu", **more)
        assert tensors_are_equal(model.network, again.network)
        assert again.record == model.record
    (tmp_path / "again" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="damaged, or of another model"):
        read(RISModel, tmp_path / "again")
    with pytest.raises(TypeError, match="devise"):
        read(RISModel, tmp_path / "again", devise="cpu")
    assert capfd.readouterr().err == ""


def test_an_upload_that_fails_is_one_sentence_with_what_to_do(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real client, towards a port of this machine where nobody listens."""
    closed = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "HfApi", closed)
    with pytest.raises(RisError, match=r"could not be uploaded to someone/model: .*hf auth login"):
        RISModel.from_pretrained(exported).push_to_hub("someone/model", token="hf_none")


def _never(*arguments: Any, **settings: Any) -> str:
    raise AssertionError("the hub was asked")
