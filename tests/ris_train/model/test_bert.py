"""Loading BERT: random by seed, from a folder, and the errors of what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ris_cache.errors import WeightsError
from ris_train.config import BertConfig
from ris_train.model.bert import BertModel, load_bert, random_bert

SMALL = BertConfig(weights=None, hidden_size=16, num_layers=1, num_heads=2, ffn_dim=32)
VOCAB_SIZE = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the weights of a small BERT."""
    bert, _ = random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=1)
    bert.save_pretrained(tmp_path)
    return tmp_path


def states_equal(first: BertModel, second: BertModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_random_weights_are_a_function_of_the_seed_alone() -> None:
    first, record = random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=1)
    torch.manual_seed(99)
    second, _ = random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=1)
    other, _ = random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=2)
    assert states_equal(first, second)
    assert not states_equal(first, other)
    assert (record.kind, record.seed, record.sha256) == ("random", 1, None)


def test_random_weights_leave_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bert_has_no_pooler_and_the_published_size() -> None:
    with torch.device("meta"):
        bert, _ = random_bert(BertConfig(), vocab_size=30522, seed=0)
    assert bert.pooler is None
    assert sum(parameter.numel() for parameter in bert.parameters()) == 108_891_648


def test_weights_of_a_folder_are_loaded_and_recorded(folder: Path) -> None:
    source, _ = random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=1)
    config = SMALL.model_copy(update={"weights": str(folder)})
    bert, record = load_bert(config, vocab_size=VOCAB_SIZE, random_seed=None)
    assert states_equal(bert, source)
    assert record.kind == "file"
    assert record.sha256 is not None
    assert len(record.sha256) == 64


def test_random_weights_win_over_a_folder_when_asked_for(folder: Path) -> None:
    config = SMALL.model_copy(update={"weights": str(folder)})
    _, record = load_bert(config, vocab_size=VOCAB_SIZE, random_seed=4)
    assert (record.kind, record.seed) == ("random", 4)


def test_a_recipe_without_weights_says_how_to_go_on() -> None:
    with pytest.raises(WeightsError, match=r"model\.bert\.weights.*--random-weights"):
        load_bert(SMALL, vocab_size=VOCAB_SIZE, random_seed=None)


def test_a_folder_without_weights_is_named_with_the_files_sought(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"weights": str(tmp_path)})
    with pytest.raises(WeightsError, match=r"model\.safetensors, pytorch_model\.bin") as caught:
        load_bert(config, vocab_size=VOCAB_SIZE, random_seed=None)
    assert str(tmp_path) in str(caught.value)


def test_a_vocabulary_larger_than_berts_is_refused(folder: Path) -> None:
    config = SMALL.model_copy(update={"weights": str(folder)})
    with pytest.raises(WeightsError, match=r"41 word pieces.*only 40"):
        load_bert(config, vocab_size=41, random_seed=None)


def test_weights_that_lack_a_layer_are_refused(folder: Path) -> None:
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert '"num_hidden_layers": 1' in text
    (folder / "config.json").write_text(
        text.replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'), encoding="utf-8"
    )
    config = SMALL.model_copy(update={"weights": str(folder)})
    with pytest.raises(WeightsError, match=r"lack .*encoder\.layer\.1"):
        load_bert(config, vocab_size=VOCAB_SIZE, random_seed=None)


def test_half_precision_weights_are_loaded_in_single_precision(folder: Path) -> None:
    bert, _ = random_bert(SMALL, vocab_size=VOCAB_SIZE, seed=1)
    bert.half().save_pretrained(folder)
    config = SMALL.model_copy(update={"weights": str(folder)})
    loaded, _ = load_bert(config, vocab_size=VOCAB_SIZE, random_seed=None)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_weights_cut_short_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    config = SMALL.model_copy(update={"weights": str(folder)})
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_bert(config, vocab_size=VOCAB_SIZE, random_seed=None)
