"""Models of strangers: no code of theirs is run, nothing of theirs is fetched, and lies are told of by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

import ris_train.data.text
from ris_cache.errors import CheckpointError, ConfigError, WeightsError
from ris_cache.vision_imports import ensure_torchvision
from ris_train.checkpoint import load_checkpoint
from ris_train.config import BertConfig
from ris_train.data.text import TINY_VOCABULARY, Tokenizer
from ris_train.model.bert import bert_from_dict, load_bert, random_bert
from ris_train.pretrained import RISModel, export
from ris_train.run import RunDirectory

ensure_torchvision()

from transformers import AutoTokenizer  # noqa: E402

Document = dict[str, Any]


@pytest.fixture(scope="module")
def exported(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run's model as a folder."""
    return export(RunDirectory(tiny_runs / "first"), "best", tmp_path_factory.mktemp("shared") / "model")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be tampered with."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Document], object]) -> None:
    """Change config.json, whose digests are then those of the files that are there."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for name in document["files"]:
        document["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(document)
    path.write_text(json.dumps(document))


def bring_code(folder: Path, marker: Path) -> None:
    """Add a tokenizer class of one's own that leaves a mark when it is imported."""
    (folder / "evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import BertTokenizer\nclass Evil(BertTokenizer): ...\n"
    )
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(described))


def test_a_tokenizer_that_brings_code_along_is_refused_and_nobody_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A yes to the question whether to run it, as `yes | ris predict` gives, changes nothing."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    bring_code(folder / "tokenizer", tmp_path / "marker")
    rewrite(folder, lambda document: document["files"].update({"tokenizer/evil.py": digest_of(folder)}))
    with pytest.raises(WeightsError, match="No BERT tokenizer"):
        RISModel.from_pretrained(folder)
    with pytest.raises(WeightsError, match="No BERT tokenizer"):
        Tokenizer.load(BertConfig(weights=None, vocabulary=str(folder / "tokenizer")), 20)
    assert not (tmp_path / "marker").exists()


def digest_of(folder: Path) -> str:
    return hashlib.sha256((folder / "tokenizer" / "evil.py").read_bytes()).hexdigest()


def test_a_file_of_the_tokenizer_that_no_digest_covers_is_refused(folder: Path) -> None:
    (folder / "tokenizer" / "added_tokens.json").write_text('{"zzz": 158}')
    with pytest.raises(CheckpointError, match=r"added_tokens\.json is not among the files") as caught:
        RISModel.from_pretrained(folder)
    assert "Remove it" in str(caught.value)


def without_tokenizer(document: Document) -> None:
    document["files"] = {"model.safetensors": document["files"]["model.safetensors"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_tokenizer, "no file of tokenizer/ is among them"),
        (
            lambda document: document["files"].update({"notes.txt": "00"}),
            "'notes.txt' is no file that a model",
        ),
    ],
    ids=["no-tokenizer", "another-file"],
)
def test_digests_are_of_the_weights_and_the_tokenizer_and_of_nothing_else(
    folder: Path, change: Callable[[Document], object], message: str
) -> None:
    """Saving over a model removes the files that it names, so it may not name others."""
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        RISModel.from_pretrained(folder)


def test_a_folder_that_is_not_there_is_never_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`my/tokenizer` could be one."""

    def never(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ris_train.data.text, "hub_problem", never)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", never)
    with pytest.raises(WeightsError, match=r"No BERT tokenizer at my/tokenizer\. ") as caught:
        Tokenizer.from_folder(Path("my/tokenizer"), 20)
    assert isinstance(caught.value.__cause__, NotADirectoryError)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("bert.hidden_size", "x", "hidden_size: Input should be a valid integer"),
        ("bert.hidden_size", 10**12, "cannot be built as it is described"),
        ("bert.hidden_size", 64, "is of another model"),
        ("bert.num_attention_heads", 0, "num_attention_heads: Input should be greater than 0"),
        ("bert.num_attention_heads", 7, "num_attention_heads does not divide hidden_size"),
        ("bert.num_hidden_layers", 10**9, "more layers than the .* tensors of the file"),
        ("bert.hidden_act", "os.system", "hidden_act"),
        ("bert.pad_token_id", 99_999, "pad_token_id is not below vocab_size"),
        ("bert.is_decoder", True, "is_decoder"),
        ("bert", {}, "is of another model"),
        ("config.model.num_queries", 10**12, "dfam"),
        ("config.model.pixel_decoder_layers", 10**9, "more layers than the .* tensors of the file"),
        ("config.model.norm_groups", 7, "num_groups"),
        ("config.model.max_tokens", 10**9, "BERT has 512 positions"),
        ("encoders.sam.width", "wide", "checkpoint"),
        ("weights", {}, "the weights of sam are not described"),
        ("weights.clip.seed", "0", "the weights of clip are not described"),
        ("weight_labels", {"sam": "a file"}, "the weights of clip are not described"),
        ("categories.names", ["one"], "not as many names as ids"),
    ],
)
def test_a_description_that_no_model_can_be_built_from_is_an_error_of_the_file(
    folder: Path, place: str, value: object, message: str
) -> None:
    """And at once: no sizes are allocated, and no layers built, that the file of weights does not have."""

    def change(document: Document) -> None:
        *parents, name = place.split(".")
        part = document["checkpoint"]
        for parent in parents:
            part = part[parent]
        part[name] = value

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        RISModel.from_pretrained(folder)


def test_a_run_is_read_with_the_same_care(tiny_runs: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tiny_runs / "first" / "checkpoints" / "best.safetensors"
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["ris"])
    described["bert"]["num_hidden_layers"] = 10**9
    save_file(load_file(path), tmp_path / "best.safetensors", metadata={"ris": json.dumps(described)})
    with pytest.raises(CheckpointError, match=r"best\.safetensors cannot be built .* more layers"):
        load_checkpoint(tmp_path / "best.safetensors", device=torch.device("cpu"))


@pytest.mark.parametrize(
    "field",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"auto_map": {"AutoModel": "evil.Evil"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"dtype": "foo"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_decides_no_shape_and_no_number_of_bert_is_not_read(field: dict[str, Any]) -> None:
    """Least of all where a kernel is to be fetched from, and run."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = bert_from_dict({**sizes, "vocab_size": 9, **field})
    assert bert.config.to_diff_dict() == bert_from_dict({**sizes, "vocab_size": 9}).config.to_diff_dict()
    assert bert.config._attn_implementation == "sdpa"


def test_the_same_holds_for_the_folder_of_pretrained_weights(tmp_path: Path) -> None:
    sizes = BertConfig(weights=None, hidden_size=8, num_layers=1, num_heads=2, ffn_dim=8, dropout=0.3)
    bert, _ = random_bert(sizes, vocab_size=9, seed=0)
    bert.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"attn_implementation": "evil/kernel", "dtype": "foo"}))
    config = BertConfig(weights=str(tmp_path), vocabulary=TINY_VOCABULARY, dropout=0.3)
    loaded, _ = load_bert(config, vocab_size=9, random_seed=None)
    assert loaded.config.hidden_dropout_prob == loaded.config.attention_probs_dropout_prob == 0.3
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in bert.state_dict().items())
    path.write_text(json.dumps(described | {"num_attention_heads": 3}))
    with pytest.raises(WeightsError, match=r"config\.json .* num_attention_heads does not divide"):
        load_bert(config, vocab_size=9, random_seed=None)


def test_word_pieces_that_the_model_does_not_know_are_refused(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    pieces = json.loads(path.read_text())
    vocabulary = pieces["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 5_000
    path.write_text(json.dumps(pieces))
    rewrite(folder, lambda document: None)
    with pytest.raises(CheckpointError, match="word pieces that the model does not know"):
        RISModel.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 1}', "{}"])
def test_a_tokenizer_that_is_none_is_an_error_of_its_folder(folder: Path, content: str) -> None:
    (folder / "tokenizer" / "tokenizer.json").write_text(content)
    rewrite(folder, lambda document: None)
    with pytest.raises(WeightsError, match=r"No BERT tokenizer at .*tokenizer"):
        RISModel.from_pretrained(folder)


@pytest.mark.parametrize("device", ["cuda:99", "abc", ""])
def test_a_device_that_is_not_there_is_refused_before_anything_is_fetched(
    device: str, monkeypatch: pytest.MonkeyPatch, tiny_runs: Path
) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    with pytest.raises(ConfigError, match=f"Device '{device}' cannot be used here: "):
        RISModel.from_pretrained("someone/model", device=device)
    with pytest.raises(ConfigError, match="`ris doctor`"):
        RISModel.from_run(RunDirectory(tiny_runs / "first"), device=device)
