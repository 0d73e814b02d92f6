"""Being written."""


def compare() -> None:
    """Being written."""
