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
_HTTP_STATUS = re.compile(r"[45]\d\d \w+ Error")
SECONDS_TO_ANSWER: Final = 10.0


def hub_failures() -> tuple[type[Exception], ...]:
    """What the hub raises.

    Its own errors, those of whichever HTTP client this version of it uses, and a RuntimeError where the
    transfer of a file breaks off.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def reason(error: BaseException) -> str:
    """The line of the hub's message that says most: behind its status and request id, where it has any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = lines[1 if len(lines) > 1 and _HTTP_STATUS.match(lines[0]) else 0].rstrip(".")
    # Where a transfer broke off, that names the file; why it did is behind it.
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return f"{line} ({reason(error.__cause__)})"
    return line


def hub_problem(source: str) -> str:
    """Say why a model of the hub cannot be fetched now, to go behind its name in an error.

    Empty where the hub answers, whatever it says.

    Args:
        source: a name on the hub. Anything else, such as a folder, is no problem of the hub's.
    """
    from huggingface_hub import constants, get_session

    if Path(source).exists() or not _HUB_NAME.fullmatch(source):
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS_TO_ANSWER)
    except hub_failures() as error:
        return (
            f": the hub at {constants.ENDPOINT} cannot be reached ({reason(error)}), and its cache here "
            "lacks it"
        )
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
