"""In which arithmetic the features of a model's cache were computed.

A checkpoint names its cache by fingerprint, which digests the arithmetic together with everything else. All
else is known, and there are few arithmetics and storage types, so the one that gives the digest is found by
trying. Checkpoints need no field for it, and what is found is certain.
"""

from __future__ import annotations

from itertools import product
from typing import Final

from ris_cache.encoders.frozen import ARITHMETICS
from ris_cache.store.fingerprint import cache_fingerprint
from ris_train.checkpoint import CheckpointMetadata

_DTYPES: Final = ("float16", "bfloat16", "float32", "int8")
_LOSSY: Final = ("float16", "bfloat16", "int8")
_MOST_CONVERSIONS: Final = 2


def feature_arithmetic(metadata: CheckpointMetadata) -> str | None:
    """Find the arithmetic of the image encoders behind a model's training features.

    Returns:
        One of `ARITHMETICS` but `auto`; None if nothing tried gives the fingerprint: a cache that was
        converted more than twice, or one of another version of the format.
    """
    weights = {role: fields for role, fields in metadata.weights.items() if role != "bert"}
    chains = [chain for length in range(_MOST_CONVERSIONS + 1) for chain in product(_LOSSY, repeat=length)]
    for arithmetic, chain, dtype in product(ARITHMETICS, chains, _DTYPES):
        tried = cache_fingerprint(
            metadata.encoder_spec, weights, arithmetic=arithmetic, dtype=dtype, rounded_through=chain
        )
        if tried.digest == metadata.fingerprint:
            return arithmetic
    return None
