"""The Hugging Face hub, asked once: where it cannot be reached, what is on this disk has to do.

Its client asks every file again for half a minute, and prints a line about each time, twice.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
SECONDS_TO_ANSWER: Final = 10.0


def hub_problem(source: str) -> str:
    """Say why a model of the hub cannot be fetched now, to go behind its name in an error.

    Empty where the hub answers, whatever it says.

    Args:
        source: a name on the hub. Anything else, such as a folder, is no problem of the hub's.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    if Path(source).exists() or not _HUB_NAME.fullmatch(source):
        return ""
    # Its own errors, and those of whichever HTTP client this version of it uses.
    failures: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        return f": the hub at {constants.ENDPOINT} cannot be reached ({reason}), and its cache here lacks it"
    return ""


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's client from printing its warnings; what it raises tells all that matters."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
