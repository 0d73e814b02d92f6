"""What Pillow may raise on damaged files, and what it must not be given."""

from __future__ import annotations

import struct
import zlib
from typing import Final

DECODING_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
)
"""What its decoders raise on damaged bytes; there is no common base class."""

RUNS_A_PROGRAM: Final = frozenset({"EPS"})
"""Formats that it hands to another program, here Ghostscript, which must not see a stranger's file."""
