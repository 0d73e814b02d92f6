"""The errors of the whole project, as one tree.

Every error a user can cause says what happened, where, and what to do. Each class carries the exit code
that the command line ends with, and inherits the builtin that fits, so library users can catch either.
The facts in a message are also attributes (`error.facts["image_id"]`), so callers need not parse text.

Exit codes: 1 failed, 2 usage or configuration, 3 data or cache missing or incomplete, 4 integrity,
5 fingerprint mismatch, 130 interrupted.
"""

from __future__ import annotations


class RisError(Exception):
    """Any failure that the project foresees. `facts` holds the values named in the message."""

    exit_code = 1

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class StoppedError(RisError):
    """Work that was asked to stop and did, with what it had done in place."""

    exit_code = 130


class ConfigError(RisError, ValueError):
    """A wrong argument, option or configuration value."""

    exit_code = 2


class ShapeError(RisError, ValueError):
    """A tensor or array of another shape than the docstring asks for."""


class DataError(RisError, ValueError):
    """A dataset, annotation or image that is missing or contradicts itself."""

    exit_code = 3


class UnsafePickleError(DataError):
    """A pickle that asks for more than plain values; nothing in it was run."""

    exit_code = 4


class WeightsError(RisError):
    """Pretrained weights that are missing or do not fit the architecture."""

    exit_code = 3


class NonFiniteError(RisError, ArithmeticError):
    """A loss, gradient or feature that is infinite or not a number."""


class CheckpointError(RisError, ValueError):
    """A checkpoint that is missing, damaged, or belongs to another model."""

    exit_code = 3


class CacheError(RisError):
    """A feature cache that cannot be used as asked."""

    exit_code = 3


class CacheMissError(CacheError, LookupError):
    """An image, table or category set that the cache does not hold."""


class IncompleteCacheError(CacheError):
    """A cache directory without a manifest: extraction has not finished there."""


class CorruptShardError(CacheError):
    """Bytes in the cache that contradict the format or their checksum."""

    exit_code = 4


class FingerprintMismatchError(CacheError):
    """A cache made by other encoders, weights or preprocessing than asked for."""

    exit_code = 5


class DiskFullError(CacheError, OSError):
    """No space left where a cache is being written; what was committed stays."""

    exit_code = 1
