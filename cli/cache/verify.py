"""Being written."""


def verify() -> None:
    """Being written."""
