"""Draw a referring dataset and write it in the files of a published one, or of several.

    <root>/refcoco/refs(unc).p                                   pickled list of refs, plain values only
    <root>/refcoco/instances.json                                COCO instances: every object, referred or not
    <root>/images/train2014/COCO_train2014_<12 digits>.jpg

The other layouts differ in the files, the splits and what is said; see `layouts`. Image ids start beyond
COCO's largest, so a root that holds the real images too loses none of them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ris_cache.datasets.shapes.compose import KIND_WEIGHTS, POOLS, SPLITS, compose_image
from ris_cache.datasets.shapes.custom import CustomLayoutWriter
from ris_cache.datasets.shapes.layouts import (
    CUSTOM,
    LAYOUT_NAMES,
    LAYOUTS,
    CocoLayoutWriter,
    LayoutWriter,
    ShapesSummary,
    deal_out,
    mixing,
    say_single,
    split_by_place,
)
from ris_cache.datasets.shapes.mixture import GREFCOCO_SHARES, Shares
from ris_cache.datasets.shapes.rows import MAX_IMAGES_PER_SPLIT, Place
from ris_cache.errors import ConfigError, DataError

MIXED_LAYOUTS: tuple[str, ...] = ("grefcoco", "ref-zom", CUSTOM)
"""Layouts that hold expressions of none and of many objects too."""

LAYOUT_SPLITS: tuple[str, ...] = (*SPLITS, "test")
"""Splits of all pools: `test` is that of the pools which do not tell testA from testB."""

_JPEG_QUALITY = 92


def write_shapes_dataset(
    root: Path,
    *,
    name: str = "refcoco",
    num_images: Mapping[str, int],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ShapesSummary:
    """Draw a referring dataset of coloured shapes and write it as RefCOCO's files, with images of its own.

    As in RefCOCO, testA and testB differ by the kind of referent: testA refers to round shapes (circle,
    heart), testB to the others; train and val to any. Every expression singles out its object with
    a margin (see `language`). The same arguments give the same bytes; the order of `num_images` is
    immaterial, and an image does not change when its split grows.

    Args:
        root: data root; directories are made as needed.
        name: "refcoco", or "refcoco+" for expressions without location words; one root can hold both, and
            they share no image. `write_layouts` writes them over the same images.
        num_images: split → number of images; splits left out are empty.
        seed: not negative.
        progress: called after each image with the number of images written so far.

    Raises:
        ConfigError: unknown name or split, a negative number, or no image at all.
        DataError: the root holds a dataset of this name already, or is a file.
    """
    _require_known("drawn dataset", name, tuple(KIND_WEIGHTS))
    _check_numbers(num_images, SPLITS, seed)
    layout = replace(LAYOUTS[name], pool=name, speak=say_single)
    writer = CocoLayoutWriter(root=root, name=name, layout=layout, seed=seed)
    (summary,) = _write([writer], root, num_images, seed, progress)
    return summary


def write_layouts(
    root: Path,
    layouts: Sequence[str],
    *,
    num_images: Mapping[str, int],
    seed: int,
    shares: Mapping[str, Mapping[str, Shares]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[ShapesSummary, ...]:
    """Draw the scenes once and write them in every layout asked for, all in one data root.

    refcoco, refcoco+ and grefcoco share images and partition, refcocog deals the same images out anew, and
    ref-zom and custom have their own (see `layouts`). An image of which a layout finds nothing to say is
    missing from it, as a few of RefCOCO's images are from RefCOCO+. Layouts can be added to a root later,
    with the same seed; refcocog's partition alone depends on the numbers of images.

    Args:
        layouts: of `LAYOUT_NAMES`; written in that order, each once.
        num_images: train, val, testA, testB and test → number of images; `test` is that of ref-zom and
            custom, which have no testA and testB. refcocog's test has as many as testA and testB together.
        seed: not negative. refcoco has the bytes of `write_shapes_dataset`.
        shares: grefcoco, ref-zom or custom → split → shares of expressions without, with one, with many
            targets; what is left out keeps its default.
        progress: called after each image with the number of images drawn so far.

    Returns:
        One summary per refs file, so two for refcocog.

    Raises:
        ConfigError: no or an unknown layout, an unknown split, a negative number, shares for a layout whose
            expressions have one target each, or no image for one of the layouts.
        DataError: the root holds one of the datasets already, images drawn with another seed, or is a file.
    """
    shares = shares or {}
    _check_numbers(num_images, LAYOUT_SPLITS, seed)
    _check_layouts(layouts, num_images)
    for name in shares:
        _require_known("layout with shares", name, MIXED_LAYOUTS)
    writers: list[LayoutWriter] = []
    for name in LAYOUT_NAMES:
        if name not in layouts:
            continue
        if name == CUSTOM:
            writers.append(CustomLayoutWriter(root=root, seed=seed, shares=shares.get(name, {})))
            continue
        layout = LAYOUTS[name]
        if name in shares:
            defaults = GREFCOCO_SHARES if name == "grefcoco" else {}
            layout = replace(layout, speak=mixing({**defaults, **shares[name]}))
        dealt = layout.has_own_partition
        split_of = deal_out(layout.pool, num_images, seed) if dealt else split_by_place
        writers.append(CocoLayoutWriter(root=root, name=name, layout=layout, seed=seed, split_of=split_of))
    return _write(writers, root, num_images, seed, progress)


def num_pictures(layouts: Sequence[str], num_images: Mapping[str, int]) -> int:
    """How many images `write_layouts` draws for these layouts; shared ones count once."""
    pools = {_pool_of(name) for name in layouts}
    return sum(num_images.get(split, 0) for pool in pools for split in POOLS[pool])


def _pool_of(layout: str) -> str:
    return CUSTOM if layout == CUSTOM else LAYOUTS[layout].pool


def _write(
    writers: Sequence[LayoutWriter],
    root: Path,
    num_images: Mapping[str, int],
    seed: int,
    progress: Callable[[int], None] | None,
) -> tuple[ShapesSummary, ...]:
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file. Name a directory for the dataset, new or existing.", path=root)
    for path in (path for writer in writers for path in writer.annotation_paths):
        if path.exists():
            raise DataError(
                f"A dataset exists already: {path} is there. Choose another directory, or remove it.",
                path=path,
            )
    for writer in writers:
        for path in writer.annotation_paths:
            path.parent.mkdir(parents=True, exist_ok=True)
    num_drawn = 0
    for pool, splits in POOLS.items():
        users = [writer for writer in writers if writer.pool == pool]
        places = [
            Place(pool=pool, split=split, index=index)
            for split in splits
            for index in range(num_images.get(split, 0))
        ]
        for place in places if users else ():
            composed = compose_image(seed=seed, name=pool, split=place.split, index=place.index)
            encoded = io.BytesIO()
            composed.picture.save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
            for writer in users:
                writer.add(composed, encoded.getvalue(), place)
            num_drawn += 1
            if progress is not None:
                progress(num_drawn)
    # Annotations go last, so that their presence means that every image is there.
    return tuple(summary for writer in writers for summary in writer.finish())


def _check_layouts(layouts: Sequence[str], num_images: Mapping[str, int]) -> None:
    if not layouts:
        raise ConfigError(f"There is no layout to write. Name any of: {', '.join(LAYOUT_NAMES)}.")
    for name in layouts:
        _require_known("layout", name, LAYOUT_NAMES)
        splits = POOLS[_pool_of(name)]
        if not any(num_images.get(split) for split in splits):
            raise ConfigError(
                f"num_images asks for no image of {name}. Its images are those of {', '.join(splits)}; give "
                "one of them a positive number.",
                layout=name,
                num_images=dict(num_images),
            )


def _require_known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ConfigError(
            f"No {what} is called {name!r}. Use one of: {', '.join(known)}.", name=name, known=known
        )


def _check_numbers(num_images: Mapping[str, int], splits: tuple[str, ...], seed: int) -> None:
    unknown = sorted(set(num_images) - set(splits))
    if unknown:
        raise ConfigError(
            f"Unknown split {unknown[0]!r} in num_images. Use any of: {', '.join(splits)}.",
            split=unknown[0],
            known=splits,
        )
    for split, count in num_images.items():
        if not 0 <= count <= MAX_IMAGES_PER_SPLIT:
            raise ConfigError(
                f"num_images asks for {count} images of split {split!r}. "
                f"Ask for 0 to {MAX_IMAGES_PER_SPLIT}.",
                split=split,
                count=count,
            )
    if not any(num_images.values()):
        raise ConfigError(
            f"num_images asks for no image. Give at least one of {', '.join(splits)} a positive number.",
            num_images=dict(num_images),
        )
    if seed < 0:
        raise ConfigError(f"seed is {seed}. Use a number from 0 upwards.", seed=seed)
