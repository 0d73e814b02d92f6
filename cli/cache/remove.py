"""Being written."""


def remove() -> None:
    """Being written."""
