"""Which images and expressions an extraction is about, and where the images lie."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ris_cache.datasets import parse_selections
from ris_cache.errors import DataError
from ris_cache.extraction.sources import Sources, load_sources
from ris_cache.store.tables import CachedImage


def load(data: Path, split: str, limit: int | None = None) -> Sources:
    return load_sources(parse_selections(split), data, limit=limit)


def known(sources: Sources, image_id: int, *, reason: str | None = None, **changes: object) -> CachedImage:
    """What a cache says of an image whose file has the digest that it has now."""
    record, path = sources.images[image_id], sources.paths[image_id]
    values = {
        "image_id": image_id,
        "row": 0,
        "namespace": "coco",
        "file_name": record.file_name,
        "height": record.height,
        "width": record.width,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path else None,
        "reason": reason,
        "crc32c": () if reason else (1, 2, 3),
    }
    return CachedImage(**(values | changes))


def test_a_split_has_its_own_images_in_ascending_order(data):
    sources = load(data, "refcoco:val")

    assert len(sources.images) == 8
    assert list(sources.images) == sorted(sources.images) == list(sources.paths)
    (part,) = sources.parts
    assert part.table_name == "refcoco.unc"
    assert {expression.split for expression in part.expressions} == {"val"}
    assert {expression.image_id for expression in part.expressions} == set(sources.images)
    assert part.incomplete_splits == frozenset()


def test_every_image_is_found_where_it_lies(data):
    sources = load(data, "refcoco:val")

    assert all(
        path is not None and path.is_file() and path.name == sources.images[i].file_name
        for i, path in sources.paths.items()
    )


def test_splits_of_one_dataset_become_one_part_however_they_are_named(data):
    apart, whole = load(data, "refcoco:testA,refcoco:train,refcoco:val,refcoco:testB"), load(data, "refcoco")

    assert apart.parts == whole.parts
    assert apart.images == whole.images
    assert len(whole.images) == 52


def test_two_datasets_are_two_parts_over_one_pool_of_images(data):
    sources = load(data, "refcoco:val,refcoco+")

    assert [part.table_name for part in sources.parts] == ["refcoco.unc", "refcoco+.unc"]
    assert len(sources.images) == 8 + 12


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_a_limit_takes_whole_images_in_the_order_of_the_expressions(limit, data):
    whole, limited = load(data, "refcoco:val"), load(data, "refcoco:val", limit)

    in_order = list(dict.fromkeys(expression.image_id for expression in whole.parts[0].expressions))
    assert set(limited.images) == set(in_order[:limit])
    assert limited.parts[0].expressions == tuple(
        expression for expression in whole.parts[0].expressions if expression.image_id in limited.images
    )
    assert limited.parts[0].incomplete_splits == {"val"}


def test_a_limit_leaves_splits_and_datasets_out_that_it_does_not_reach(data):
    sources = load(data, "refcoco:val,refcoco+", limit=10)

    first, second = sources.parts
    assert first.incomplete_splits == frozenset()
    assert len({expression.image_id for expression in second.expressions}) == 2
    assert second.incomplete_splits >= {"train"}
    assert len(load(data, "refcoco:val,refcoco+", limit=8).parts) == 1


def test_only_unknown_images_and_mended_ones_need_features(data, tmp_path):
    sources = load(data, "refcoco:val")
    ids = list(sources.images)
    cached = {
        ids[0]: known(sources, ids[0]),
        ids[1]: known(sources, ids[1], reason="damaged"),
        ids[2]: known(sources, ids[2], reason="damaged", sha256="0" * 64),
        ids[3]: known(sources, ids[3], reason="No image file", sha256=None),
        ids[4]: known(sources, ids[4], sha256="0" * 64),
    }

    wanted = [image.image_id for image in sources.needing_features(cached, tmp_path)]

    assert wanted == [ids[2], ids[3], *ids[5:]]


def test_an_image_that_is_still_missing_is_not_tried_again(data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    gone = load(own, "refcoco:val")
    image_id = next(iter(gone.images))
    gone.paths[image_id].unlink()
    sources = load(own, "refcoco:val")
    assert sources.paths[image_id] is None

    known_missing = {image_id: known(sources, image_id, reason="No image file")}

    assert len(sources.needing_features(known_missing, tmp_path)) == 7
    assert len(sources.needing_features({}, tmp_path)) == 8


@pytest.mark.parametrize(
    "changes", [{"file_name": "other.jpg"}, {"height": 5}, {"width": 5}, {"namespace": "flickr"}]
)
def test_an_image_id_that_means_another_image_is_refused(changes, data, tmp_path):
    sources = load(data, "refcoco:val")
    image_id = next(iter(sources.images))

    with pytest.raises(DataError, match=f"Image {image_id} is .* One cache holds one image per image_id"):
        sources.needing_features({image_id: known(sources, image_id, **changes)}, tmp_path)


def test_strict_names_missing_and_quarantined_images_but_not_mended_ones(data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    ids = list(load(own, "refcoco:val").images)
    load(own, "refcoco:val").paths[ids[0]].unlink()
    sources = load(own, "refcoco:val")
    cached = {
        ids[1]: known(sources, ids[1], reason="it is torn"),
        ids[2]: known(sources, ids[2], reason="it was torn", sha256="0" * 64),
        ids[3]: known(sources, ids[3]),
    }

    with pytest.raises(DataError) as caught:
        sources.require_readable(cached)

    assert str(caught.value) == (
        f"2 of 8 images cannot be extracted, for example: {sources.images[ids[0]].file_name} is missing; it is "
        "torn. Repair the files, or leave out --strict to have the images quarantined."
    )


def test_strict_has_nothing_against_readable_images(data):
    load(data, "refcoco:val").require_readable({})


def test_a_data_root_without_any_of_the_images_is_refused(data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(own / "images")

    with pytest.raises(DataError, match=str(own)):
        load(own, "refcoco:val")


def test_a_data_root_without_the_annotations_is_refused(tmp_path):
    with pytest.raises(DataError, match="refs"):
        load(tmp_path, "refcoco:val")


def write_custom(data: Path, *lines: dict[str, object]) -> None:
    """Write `custom/birds.jsonl` over one drawn image, 1.png."""
    (data / "custom").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(data / "custom/1.png")
    common = {"image": "1.png", "expression": "a bird", "split": "dawn"}
    (data / "custom/birds.jsonl").write_text("\n".join(json.dumps(common | line) for line in lines))


def test_custom_images_keep_a_namespace_of_their_own(data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    write_custom(own, {}, {"split": "dusk"})
    sources = load(own, "custom/birds:dawn,refcoco:val")

    assert [part.table_name for part in sources.parts] == ["custom.birds", "refcoco.unc"]
    assert len(sources.images) == 1 + 8
    custom_id = max(sources.images)
    assert sources.paths[custom_id] == own / "custom/1.png"
    wanted = {image.image_id: image for image in sources.needing_features({}, tmp_path)}
    assert (wanted[custom_id].namespace, wanted[custom_id].file_name) == ("custom/birds", "custom/1.png")
    assert {image.namespace for i, image in wanted.items() if i != custom_id} == {"coco"}
    cached = known(sources, custom_id, namespace="custom/birds")
    assert custom_id not in {
        image.image_id for image in sources.needing_features({custom_id: cached}, tmp_path)
    }
    with pytest.raises(DataError, match=f"Image {custom_id} is"):
        sources.needing_features({custom_id: known(sources, custom_id)}, tmp_path)


def test_an_image_that_two_datasets_describe_differently_is_refused(data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.copytree(own / "refcoco", own / "refcocog")
    (own / "refcocog/refs(unc).p").rename(own / "refcocog/refs(umd).p")
    assert len(load(own, "refcoco:val,refcocog:val").images) == 8
    path = own / "refcocog/instances.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["file_name"] = "other.jpg"
    path.write_text(json.dumps(content))

    with pytest.raises(DataError, match=r"in refcocog.umd, but .* in another of the selected datasets"):
        load(own, "refcoco:val,refcocog:val")
