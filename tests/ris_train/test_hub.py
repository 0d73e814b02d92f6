"""A hub that cannot be reached is asked once, and told of in a sentence."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from ris_cache.errors import WeightsError
from ris_train.config import BertConfig
from ris_train.data.text import Tokenizer
from ris_train.hub import hub_problem, quiet_hub
from ris_train.model.bert import load_bert

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub at a port of this machine where nobody listens."""
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hub that knows nothing."""

    class Unknowing(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Unknowing) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("closed")
def test_weights_that_cannot_be_fetched_are_an_error_at_once_and_no_line_more(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    began = time.monotonic()
    name = "someone/no-such-bert"
    reason = rf"the hub at {NOBODY} cannot be reached \(.*refused\), and its cache here lacks it"
    with pytest.raises(WeightsError, match=f"No BERT tokenizer at {name}: {reason}") as caught:
        Tokenizer.from_folder(name, 20)
    assert "\n" not in str(caught.value)
    config = BertConfig(weights=name, vocabulary="package:tiny")
    with pytest.raises(WeightsError, match=rf"from the hub: {reason}\. Download {name} "):
        load_bert(config, vocab_size=159, random_seed=None)
    assert time.monotonic() - began < 5, "nothing is asked for again and again"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.usefixtures("answering")
def test_a_hub_that_answers_is_no_problem_whatever_it_says() -> None:
    assert hub_problem("someone/no-such-bert") == ""


@pytest.mark.usefixtures("closed")
def test_what_is_no_name_on_the_hub_is_not_asked_for(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "missing", "./a", "../a", "a/b/c", ""):
        assert hub_problem(str(source)) == ""
    assert hub_problem("bert-base-uncased") != ""


def test_the_client_speaks_again_afterwards() -> None:
    logger = logging.getLogger("huggingface_hub.utils")
    before = logger.isEnabledFor(logging.WARNING)
    with quiet_hub():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING) == before
