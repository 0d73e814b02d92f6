"""The cache's tables: explicit Arrow schemas, and the way between them and the typed records.

Tables are Parquet files that any reader opens. A reader here checks the schema first, so a table written by
something else is refused by name instead of failing somewhere inside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from safetensors import SafetensorError

from ris_cache.datasets.records import ExpressionRecord, InstanceRecord
from ris_cache.datasets.segmentation import to_json
from ris_cache.errors import CorruptShardError, ShapeError
from ris_cache.store.columns import InstanceTable, expression_columns

OK = "ok"
QUARANTINED = "quarantined"
NO_CATEGORY = -1


def _required(name: str, arrow_type: Any) -> Any:
    return pa.field(name, arrow_type, nullable=False)


def _list_of(arrow_type: Any) -> Any:
    return pa.list_(pa.field("element", arrow_type, nullable=False))


IMAGES = pa.schema(
    [
        _required("image_id", pa.int64()),
        _required("namespace", pa.string()),
        _required("row", pa.int64()),
        _required("file_name", pa.string()),
        _required("height", pa.int32()),
        _required("width", pa.int32()),
        pa.field("sha256", pa.string()),
        _required("status", pa.string()),
        pa.field("reason", pa.string()),
        _required("crc32c", _list_of(pa.uint32())),
    ]
)
"""One row per image; sha256 is null where the file could not be read, reason where status is ok; crc32c has
one entry per array of the manifest, of the image's row in it, and none where there are no features."""

EXPRESSIONS = pa.schema(
    [
        _required("split", pa.string()),
        _required("ref_id", pa.int64()),
        _required("sent_id", pa.int64()),
        _required("sent_index", pa.int32()),
        _required("image_id", pa.int64()),
        _required("raw", pa.string()),
        _required("sent", pa.string()),
        _required("ann_ids", _list_of(pa.int64())),
        _required("category_ids", _list_of(pa.int32())),
        _required("is_degenerate", pa.bool_()),
        _required("no_target", pa.bool_()),
        _required("category_id", pa.int32()),
        _required("clip_category_id", pa.int32()),
    ]
)
"""One row per expression; category_id is the first of category_ids; -1 where there is none."""

INSTANCES = pa.schema(
    [
        _required("ann_id", pa.int64()),
        _required("image_id", pa.int64()),
        _required("category_id", pa.int32()),
        _required("segmentation", pa.string()),
        _required("iscrowd", pa.bool_()),
    ]
)
"""One row per instance; segmentation is JSON text, polygons or RLE, lossless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedImage:
    """One image of the cache.

    Attributes:
        namespace: whose ids `image_id` is one of, e.g. coco.
        row: where its features lie in every array.
        sha256: of the image file; None where the file could not be read.
        reason: why it is quarantined; None if it is not.
        crc32c: checksum of its row in each array, in the order of the manifest's; empty if quarantined.
    """

    image_id: int
    namespace: str
    row: int
    file_name: str
    height: int
    width: int
    sha256: str | None
    reason: str | None
    crc32c: tuple[int, ...] = ()

    @property
    def is_quarantined(self) -> bool:
        """Whether the cache holds no features of it."""
        return self.reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedExpression(ExpressionRecord):
    """An expression with what the extraction adds.

    Attributes:
        clip_category_id: raw COCO id of the category that CLIP predicts, -1 if none was predicted.
    """

    clip_category_id: int

    @property
    def category_id(self) -> int:
        """Raw COCO id of the first target, -1 if there is none."""
        return self.category_ids[0] if self.category_ids else NO_CATEGORY


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CategorySet:
    """CLIP's text embeddings of a list of categories; entry k of each attribute belongs together.

    Attributes:
        ids: raw category ids.
        names: as put into the template.
        template: prompt with one `{}`.
        embeddings: float32[K, D].
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    template: str
    embeddings: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        embeddings = self.embeddings
        if embeddings.ndim != 2 or embeddings.dtype != np.float32:
            raise ShapeError(
                f"Category embeddings must be float32[K, D]; got "
                f"{embeddings.dtype.name}{list(embeddings.shape)}.",
                shape=embeddings.shape,
            )
        if not len(self.ids) == len(self.names) == len(embeddings):
            raise ShapeError(
                f"A category set needs as many ids as names and embeddings; got {len(self.ids)}, "
                f"{len(self.names)} and {len(embeddings)}.",
                shape=embeddings.shape,
            )


def images_table(images: Iterable[CachedImage]) -> Any:
    """Return the table of images, by ascending row."""
    ordered = sorted(images, key=lambda image: image.row)
    columns: dict[str, list[Any]] = {
        name: [getattr(image, name) for image in ordered] for name in IMAGES.names if name != "status"
    }
    columns["status"] = [QUARANTINED if image.is_quarantined else OK for image in ordered]
    return pa.table(columns, schema=IMAGES)


def read_images(table: Any) -> list[CachedImage]:
    """Return the images of a table, in its order."""
    names = [name for name in IMAGES.names if name != "status"]
    columns = {name: table.column(name).to_pylist() for name in names}
    columns["crc32c"] = [tuple(values) for values in columns["crc32c"]]
    return [
        CachedImage(**dict(zip(names, values, strict=True))) for values in zip(*columns.values(), strict=True)
    ]


def expressions_table(expressions: Sequence[ExpressionRecord], clip_category_ids: Sequence[int]) -> Any:
    """Return the table of expressions, in their order.

    Args:
        clip_category_ids: of each expression; -1 where CLIP predicted none.
    """
    if len(clip_category_ids) != len(expressions):
        raise ShapeError(
            f"{len(expressions)} expressions need as many clip_category_ids; got {len(clip_category_ids)}.",
            expected=len(expressions),
            found=len(clip_category_ids),
        )
    stored_as_is = EXPRESSIONS.names[: EXPRESSIONS.names.index("no_target")]
    columns: dict[str, Any] = {
        name: [getattr(expression, name) for expression in expressions] for name in stored_as_is
    }
    columns["no_target"] = [expression.is_no_target for expression in expressions]
    columns["category_id"] = [
        expression.category_ids[0] if expression.category_ids else NO_CATEGORY for expression in expressions
    ]
    columns["clip_category_id"] = clip_category_ids
    return pa.table(columns, schema=EXPRESSIONS)


def read_expressions(table: Any) -> list[CachedExpression]:
    """Return the expressions of a table, in its order."""
    names = (*EXPRESSIONS.names[: EXPRESSIONS.names.index("no_target")], "clip_category_id")
    columns = expression_columns(table, names)
    return [
        CachedExpression(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)
    ]


def instances_table(instances: Iterable[InstanceRecord]) -> Any:
    """Return the table of instances, by ascending ann_id."""
    ordered = sorted(instances, key=lambda instance: instance.ann_id)
    return pa.table(
        {
            "ann_id": [instance.ann_id for instance in ordered],
            "image_id": [instance.image_id for instance in ordered],
            "category_id": [instance.category_id for instance in ordered],
            "segmentation": [to_json(instance.segmentation) for instance in ordered],
            "iscrowd": [instance.is_crowd for instance in ordered],
        },
        schema=INSTANCES,
    )


def read_instances(table: Any) -> InstanceTable:
    """Return the instances of a table by ann_id; segmentations are parsed when they are asked for."""
    return InstanceTable(table)


def table_bytes(table: Any) -> bytes:
    """Return a table as the bytes of a Parquet file; the same table gives the same bytes."""
    buffer = BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_table(source: Path | BinaryIO, schema: Any, *, name: Path | None = None) -> Any:
    """Read a Parquet file that must have a schema.

    Args:
        source: its path, or its open content.
        name: what to call it in messages; by default its path.

    Raises:
        CorruptShardError: missing, not Parquet, or with other columns; the message names them.
    """
    shown = name or source
    try:
        # Not `pq.read_table`: that reads folder names such as `split=val` above the file as further columns.
        # And on this thread alone: pyarrow's pools now and then abort a process that ends soon after reading.
        with pq.ParquetFile(source, pre_buffer=False) as file:
            table = file.read(use_threads=False)
        table.validate(full=True)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(shown, f"cannot be read as Parquet ({error})") from error
    if not table.schema.equals(schema):
        found = {field.name: str(field) for field in table.schema}
        expected = {field.name: str(field) for field in schema}
        wrong = [
            f"{name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
            for name in dict.fromkeys((*expected, *found))
            if expected.get(name) != found.get(name)
        ]
        raise _damaged(shown, "has other columns: " + ("; ".join(wrong) or "their order differs"))
    return table


def category_set_files(categories: CategorySet) -> tuple[bytes, bytes]:
    """Return a category set as the bytes of its safetensors file and of its JSON file."""
    tensors = safetensors.numpy.save({"embeddings": np.ascontiguousarray(categories.embeddings)})
    description = {"ids": categories.ids, "names": categories.names, "template": categories.template}
    return tensors, (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def read_category_set(tensors_path: Path, description_path: Path) -> CategorySet:
    """Read a category set from its two files.

    Raises:
        CorruptShardError: a file is missing or damaged, or they do not fit each other.
    """
    embeddings = read_tensors(tensors_path).get("embeddings")
    if embeddings is None:
        raise _damaged(tensors_path, "holds no tensor `embeddings`")
    try:
        description = json.loads(description_path.read_bytes())
        return CategorySet(
            ids=tuple(int(category_id) for category_id in description["ids"]),
            names=tuple(str(name) for name in description["names"]),
            template=str(description["template"]),
            embeddings=embeddings,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(description_path, f"does not describe the category set ({error})") from error


def read_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a safetensors file.

    Raises:
        CorruptShardError: missing or damaged.
    """
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, f"cannot be read as safetensors ({error})") from error


def _damaged(path: object, problem: str) -> CorruptShardError:
    return CorruptShardError(
        f"{path} {problem}. Restore it from a copy, or extract the cache again into another directory with "
        "`ris extract`.",
        path=path,
        problem=problem,
    )
