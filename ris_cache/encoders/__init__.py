"""The frozen encoders, as far as they can be named without importing torch; see `frozen.FrozenEncoders`."""

from ris_cache.encoders.spec import PRESETS, ClipSpec, EncoderSpec, Normalisation, SamSpec
from ris_cache.encoders.weights import (
    FileWeights,
    RandomWeights,
    WeightsRecord,
    WeightsSource,
    describe_weights,
    resolve_clip_weights,
    resolve_sam_weights,
)

__all__ = [
    "PRESETS",
    "ClipSpec",
    "EncoderSpec",
    "FileWeights",
    "Normalisation",
    "RandomWeights",
    "SamSpec",
    "WeightsRecord",
    "WeightsSource",
    "describe_weights",
    "resolve_clip_weights",
    "resolve_sam_weights",
]
