"""Which expressions a run trains and is validated on, as a digest.

A cache may come to hold others while its features, and so its fingerprint, stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict

from ris_train.data.samples import Samples


class DataDigest(BaseModel):
    """Expressions in their order, told by table, ref_id and sent_id.

    Attributes:
        num_samples: how many.
        sha256: lower-case hex.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_samples: int
    sha256: str

    @classmethod
    def of(cls, samples: Samples, tables: Iterable[str]) -> DataDigest:
        """Digest samples, at the cost of reading two columns.

        Args:
            samples: the expressions.
            tables: what tells which table each is of, such as the parts of a training set and the number of
                expressions in each.
        """
        digest = hashlib.sha256("\n".join(tables).encode())
        for name in ("ref_id", "sent_id"):
            digest.update(samples.column(name).astype("<i8").tobytes())
        return cls(num_samples=len(samples), sha256=digest.hexdigest())
