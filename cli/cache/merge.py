"""Being written."""


def merge() -> None:
    """Being written."""
