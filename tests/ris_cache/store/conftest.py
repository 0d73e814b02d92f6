"""Small caches of drawn features: no encoder and no image file, the same numbers for the same image_id."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ris_cache.datasets.records import ExpressionRecord, InstanceRecord
from ris_cache.encoders.spec import TINY
from ris_cache.store import files
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.manifest import Manifest
from ris_cache.store.planning import NewImage
from ris_cache.store.tables import CachedImage, CategorySet
from ris_cache.store.writer import CacheWriter, Outcome, ShardClaim

Array = npt.NDArray[Any]
SHAPES = {"sam": (2, 3, 3), "clip": (4, 2), "clip_pooled": (5,)}
TABLE = "refcoco.unc"
REASON = "cut off in the middle"
FORMATS = [
    (backend, dtype) for backend in ("zarr", "hdf5") for dtype in ("float16", "bfloat16", "float32", "int8")
]


@dataclass(frozen=True)
class Drawing:
    """Writes caches whose every value follows from the image_id.

    Attributes:
        seed: of the weights that the fingerprint names; another one is another cache.
    """

    backend: str = "zarr"
    dtype: str = "float16"
    shard_rows: int = 4
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            fingerprint=cache_fingerprint(
                TINY, {"sam": {"seed": self.seed}}, arithmetic="float32", dtype=self.dtype
            ),
            preset="tiny",
            weights={"sam": f"random(seed={self.seed})"},
            shapes=SHAPES,
            dtype=self.dtype,
            backend=self.backend,
            shard_rows=self.shard_rows,
            libraries={"torch": "2.6"},
        )

    def image(self, image_id: int, **changes: Any) -> NewImage:
        values: dict[str, Any] = {
            "image_id": image_id,
            "file_name": f"{image_id:012}.jpg",
            "height": 30 + image_id,
            "width": 40,
        }
        return NewImage(**(values | changes))

    def stored(self, image_ids: Iterable[int]) -> dict[str, Array]:
        """[n, ...] of every stored array, as a cache holds it."""
        rows = [self._row(image_id) for image_id in image_ids]
        return {
            array.name: np.array([row[array.name] for row in rows], array.numpy_dtype).reshape(
                len(rows), *array.shape
            )
            for array in self.recipe.arrays
        }

    def _row(self, image_id: int) -> dict[str, Array]:
        generator = np.random.default_rng(image_id)
        drawn: dict[str, Array] = {}
        for array in self.recipe.arrays:
            values = generator.standard_normal(array.shape).astype(np.float32)
            match array.dtype:
                case "uint16":  # bfloat16 is the upper half of a float32
                    drawn[array.name] = (values.view(np.uint32) >> 16).astype(np.uint16)
                case "int8":
                    drawn[array.name] = generator.integers(-127, 128, array.shape).astype(np.int8)
                case _:
                    drawn[array.name] = values.astype(array.numpy_dtype)
        return drawn

    def open(
        self,
        root: Path,
        image_ids: Iterable[int],
        request: Mapping[str, Any] | None = None,
        purpose: str = "extract",
        **options: Any,
    ) -> CacheWriter:
        """Plan or join what adds those images that the cache lacks."""
        wanted = list(image_ids)

        def choose(known: Mapping[int, CachedImage]) -> list[NewImage]:
            return [self.image(image_id) for image_id in wanted if image_id not in known]

        return CacheWriter.open(
            root,
            self.recipe,
            purpose=purpose,
            request={"--split": "val"} if request is None else request,
            choose=choose,
            **options,
        )

    def commit(self, claim: ShardClaim, bad: Sequence[int] = ()) -> None:
        image_ids = [image.image_id for image in claim.images]
        claim.commit(
            self.stored(image_id for image_id in image_ids if image_id not in bad),
            [
                Outcome(sha256=None, reason=REASON) if image_id in bad else Outcome(sha256=f"{image_id:064x}")
                for image_id in image_ids
            ],
        )

    def commit_all(self, writer: CacheWriter, bad: Sequence[int] = ()) -> list[int]:
        """Commit what nobody else has; returns these shards."""
        shards = []
        for claim in writer.free_claims():
            self.commit(claim, bad)
            shards.append(claim.shard)
        return shards

    def edit(
        self, image_ids: Iterable[int], split: str, table: str = TABLE, category_set: str = "coco"
    ) -> Callable[[CacheDraft], None]:
        """Add one expression and one instance for each image, a category set, and the heads."""
        wanted = list(image_ids)

        def change(draft: CacheDraft) -> None:
            draft.write_tables(
                table,
                [self.expression(image_id, split) for image_id in wanted],
                [self.instance(image_id) for image_id in wanted],
                clip_category_ids=[1] * len(wanted),
                category_set=category_set,
            )
            draft.write_categories(category_set, self.categories())
            draft.write_sam_heads({"mask_tokens": np.ones((2, 3), np.float32).T, "scale": np.array(2.5)})

        return change

    def expression(self, image_id: int, split: str = "val", **changes: Any) -> ExpressionRecord:
        """Of an image, with its one instance as target."""
        values: dict[str, Any] = {
            "split": split,
            "ref_id": image_id // 2,
            "sent_id": image_id,
            "sent_index": 0,
            "image_id": image_id,
            "raw": "A cup",
            "sent": "a cup",
            "ann_ids": (1000 + image_id,),
            "category_ids": (47,),
            "is_degenerate": False,
        }
        return ExpressionRecord(**(values | changes))

    def instance(self, image_id: int, **changes: Any) -> InstanceRecord:
        values: dict[str, Any] = {
            "ann_id": 1000 + image_id,
            "image_id": image_id,
            "category_id": 47,
            "segmentation": ((0.0, 0.0, 9.5, 0.0, 9.5, 9.5),),
            "is_crowd": False,
        }
        return InstanceRecord(**(values | changes))

    def categories(self, **changes: Any) -> CategorySet:
        values: dict[str, Any] = {
            "ids": (1, 47),
            "names": ("person", "cup"),
            "template": "a photo of a {}.",
            "embeddings": np.eye(2, 5, dtype=np.float32),
        }
        return CategorySet(**(values | changes))

    def extract(
        self,
        root: Path,
        image_ids: Iterable[int],
        split: str = "val",
        *,
        bad: Sequence[int] = (),
        table: str = TABLE,
        request: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """From nothing, or from the cache in `root`, to a finished cache."""
        wanted = list(image_ids)
        writer = self.open(root, wanted, {"--split": f"{table}:{split}"} if request is None else request)
        self.commit_all(writer, bad)
        return writer.finish(self.edit(wanted, split, table))

    def require_features(self, cache: FeatureCache, image_ids: Sequence[int]) -> None:
        batch = cache.read(image_ids)
        assert batch.image_ids.tolist() == list(image_ids)
        for name, expected in self.stored(image_ids).items():
            assert batch.stored[name].dtype == expected.dtype
            assert batch.stored[name].tobytes() == expected.tobytes(), name

    def require_whole(self, root: Path) -> FeatureCache:
        """Every file listed lies there with its digest, no features but these do, and all of them read."""
        cache = FeatureCache.open(root)
        for relative, entry in cache.manifest.files.items():
            digest = files.sha256_file(root / relative)
            assert (digest.num_bytes, digest.sha256) == (entry.bytes, entry.sha256), relative
        on_disk = {name for name in files.all_files(root) if not name.endswith("zarr.json")}
        features = {name for name in on_disk if name.startswith("features")}
        assert features == set(cache.manifest.shard_files())
        assert not [name for name in on_disk if files.is_temporary(name)]
        assert not (root / files.EXTRACTION_NAME).exists()
        self.require_features(cache, cache.image_ids.tolist())
        return cache


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power cuts are the business of test_files.py; elsewhere fsync would take most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def drawing() -> Drawing:
    """Zarr and float16, the defaults."""
    return Drawing()


@pytest.fixture(scope="session")
def other_drawing() -> Drawing:
    """Other weights than those of `drawing`."""
    return Drawing(seed=1)


@pytest.fixture(scope="session", params=FORMATS, ids=lambda pair: "-".join(pair))
def any_drawing(request: pytest.FixtureRequest) -> Drawing:
    """Each backend with each precision."""
    backend, dtype = request.param
    return Drawing(backend=backend, dtype=dtype)


@pytest.fixture(scope="session", params=["zarr", "hdf5"])
def either_drawing(request: pytest.FixtureRequest) -> Drawing:
    """Each backend."""
    return Drawing(backend=request.param)


@pytest.fixture(scope="session")
def drawn_cache(tmp_path_factory: pytest.TempPathFactory, any_drawing: Drawing) -> Path:
    """Images 0 to 9 in three shards, image 5 quarantined; to read, not to change."""
    root = tmp_path_factory.mktemp("drawn") / "feats"
    any_drawing.extract(root, range(10), bad=(5,))
    return root


@pytest.fixture
def threads_end() -> Iterator[None]:
    """Fail a test that leaves threads behind."""
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    assert not left, f"threads {left} outlive the test"
