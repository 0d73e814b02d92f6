"""Being written."""


def convert() -> None:
    """Being written."""
