"""Being written."""


def gc() -> None:
    """Being written."""
