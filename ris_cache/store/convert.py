"""Converting a cache: the same images in another backend, precision or shard size, in a new directory.

Nothing is lost between backends, nor from a precision to float32, which holds every value of the others. What
did lose something on the way stands in the fingerprint (`rounded_through`), so that two caches have the same
fingerprint only if their features were rounded alike: float32 converted to float16 is what an extraction in
float16 gives, float16 converted to float32 is not what one in float32 gives, and going back is exact again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ris_cache.errors import ConfigError, NonFiniteError
from ris_cache.progress import Progress
from ris_cache.store import files
from ris_cache.store.backends import make_backend
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.journal import Journal
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import Manifest
from ris_cache.store.planning import NewImage, load_base
from ris_cache.store.precision import QUANTISERS
from ris_cache.store.tables import CachedImage
from ris_cache.store.transfer import as_new, copy_annotations, origins, transfer

PURPOSE = "cache convert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion is to do; `plan_conversion` makes and checks it.

    Attributes:
        recipe: of the new cache.
    """

    source: FeatureCache
    target: Path
    recipe: Recipe

    @property
    def is_exact(self) -> bool:
        """Whether features decode to the same values afterwards."""
        before = self.source.manifest.dtype
        if self.recipe.dtype in (before, "float32"):
            return True
        return self.rounded_through != (*_rounded_through(self.source.fingerprint), *_lossy(before))

    @property
    def rounded_through(self) -> tuple[str, ...]:
        """Precisions that features were rounded to before, in this order; part of the fingerprint."""
        return _rounded_through(self.recipe.fingerprint)

    @property
    def num_shards(self) -> int:
        """Shards of the new cache that hold images."""
        rows = sorted(image.row for image in self.source.images.values())
        if not self.keeps_rows:
            return -(-len(rows) // self.recipe.shard_rows)
        return len({row // self.recipe.shard_rows for row in rows})

    @property
    def num_bytes(self) -> int:
        """Bytes of features in the new cache."""
        return len(self.source) * self.recipe.image_bytes

    @property
    def keeps_rows(self) -> bool:
        """Whether every image gets the row that it has."""
        return self.recipe.shard_rows == self.source.manifest.shard_rows

    @property
    def request(self) -> dict[str, str | int]:
        """What processes that do this together have in common."""
        return {
            "SRC": self.source.manifest.digest[:16],
            "--store": self.recipe.backend,
            "--dtype": self.recipe.dtype,
            "--shard-rows": self.recipe.shard_rows,
        }


def plan_conversion(
    source: Path,
    target: Path,
    *,
    backend: str | None = None,
    dtype: str | None = None,
    shard_rows: int | None = None,
) -> Conversion:
    """Say what a conversion would do; nothing is written.

    Args:
        source: a finished cache.
        target: a new or empty directory, or one in which the same conversion was cut off or is under way.
        backend, dtype, shard_rows: of the new cache; by default those of the source.

    Raises:
        ConfigError: a target that is taken, or lies inside the source; an unknown backend or precision.
        CacheError: the source cannot be opened.
    """
    if source.resolve() == target.resolve():
        raise ConfigError(
            f"{source} and {target} are the same directory. A cache is converted into another one: name a "
            "new directory.",
            source=source,
            target=target,
        )
    cache = FeatureCache.open(source)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"{target} lies inside the cache {source}. Name a directory outside of it.",
            source=source,
            target=target,
        )
    found = Recipe.of(cache.manifest)
    recipe = replace(
        found,
        fingerprint=converted_fingerprint(cache.fingerprint, dtype or found.dtype),
        backend=backend or found.backend,
        dtype=dtype or found.dtype,
        shard_rows=shard_rows or found.shard_rows,
    )
    make_backend(recipe.backend, target, recipe.arrays, recipe.shard_rows)  # refuses unknown names
    conversion = Conversion(source=cache, target=target, recipe=recipe)
    _require_free_target(conversion)
    return conversion


def convert(
    conversion: Conversion,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, Manifest]:
    """Write the new cache: shard by shard, going on where a conversion was cut off.

    Tables, category sets, SAM's heads and quarantined images come along.

    Returns:
        How many images this process copied, and the manifest of the new cache.

    Raises:
        NonFiniteError: a value that the new precision cannot hold; the target is left empty then.
        ConfigError: the target has been taken meanwhile.
        CacheError, CorruptShardError, DiskFullError, StoppedError: as `transfer`.
    """
    source, target, recipe = conversion.source, conversion.target, conversion.recipe

    def choose(known: Mapping[int, CachedImage]) -> list[NewImage]:
        _require_free_target(conversion)  # again, now that no other process can take it
        images = sorted(source.images.values(), key=lambda image: image.row)
        return [
            as_new(image, row=image.row if conversion.keeps_rows else None)
            for image in images
            if image.image_id not in known
        ]

    def edit(draft: CacheDraft) -> None:
        copy_annotations(draft, source)
        if conversion.keeps_rows and source.manifest.rows:
            # Rows at the end may have lost their images; the arrays stay as long as they are.
            draft.add_shard(source.manifest.rows // recipe.shard_rows - 1, {}, ())

    try:
        return transfer(
            target,
            recipe,
            purpose=PURPOSE,
            request=conversion.request,
            choose=choose,
            origin_of=origins([source]).__getitem__,
            edit=edit,
            progress=progress,
            should_stop=should_stop,
        )
    except NonFiniteError as error:
        remedy = (
            f"Nothing is kept in {target}: run the command again with such a --dtype."
            if _give_up(target)
            else f"Other processes still write to {target}: name another directory with such a --dtype."
        )
        raise NonFiniteError(f"{error} {remedy}", **error.facts) from error


def converted_fingerprint(found: Fingerprint, dtype: str) -> Fingerprint:
    """Return the fingerprint of a cache converted to a precision."""
    before = str(found.fields["dtype"])
    if dtype == before:
        return found
    through = [*_rounded_through(found), *_lossy(before)]
    # Rounding again what was rounded to the same floats changes nothing. An int8 scale may change in its last
    # digit when it is computed again.
    if through[-1:] == [dtype] and dtype not in QUANTISERS:
        through.pop()
    return Fingerprint.of(
        {
            **found.fields,
            "dtype": dtype,
            "quantiser": QUANTISERS.get(dtype, "none"),
            "rounded_through": through,
        }
    )


def _rounded_through(fingerprint: Fingerprint) -> tuple[str, ...]:
    return tuple(fingerprint.fields.get("rounded_through", ()))


def _lossy(dtype: str) -> tuple[str, ...]:
    """A precision as an entry of `rounded_through`: features are computed in float32, which loses nothing."""
    return () if dtype == "float32" else (dtype,)


def _require_free_target(conversion: Conversion) -> None:
    """Refuse a target that holds anything but this conversion, under way, cut off or finished."""
    target = conversion.target
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a directory for the new cache.", path=target)
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    base = load_base(target)
    plan = Journal(target).read_plan()
    if base is not None:
        if not _is_result(conversion, base):
            raise ConfigError(
                f"{target} holds a cache already. Name a new directory; nothing was changed.", path=target
            )
    elif plan is not None:
        if plan.request != conversion.request:
            described = ", ".join(f"{name} {value}" for name, value in plan.request.items())
            raise ConfigError(
                f"{target} holds an unfinished `ris {plan.purpose}` of something else ({described}). Finish "
                "it with the same command, remove the directory, or name another one.",
                path=target,
                request=dict(plan.request),
            )
    elif names and not names & {files.LOCK_NAME, files.EXTRACTION_NAME}:
        raise ConfigError(
            f"{target} is not empty. Name a new or empty directory; nothing was changed.", path=target
        )


def _is_result(conversion: Conversion, base: Manifest) -> bool:
    """Whether a finished cache is what the conversion makes; so it is for a process that comes late."""
    wanted, recipe = conversion.source.manifest, conversion.recipe
    if (
        base.fingerprint.digest != recipe.fingerprint.digest
        or (base.backend, base.shard_rows) != (recipe.backend, recipe.shard_rows)
        or base.category_sets != wanted.category_sets
        or {name: entry.splits for name, entry in base.datasets.items()}
        != {name: entry.splits for name, entry in wanted.datasets.items()}
    ):
        return False
    found = FeatureCache.open(conversion.target)
    return _outcomes(found) == _outcomes(conversion.source)


def _outcomes(cache: FeatureCache) -> dict[int, tuple[str | None, str | None]]:
    return {image_id: (image.sha256, image.reason) for image_id, image in cache.images.items()}


def _give_up(target: Path) -> bool:
    """Empty a target that can never be finished; False if another process works on it or has finished it."""
    with FileLock(target / files.LOCK_NAME):
        if (target / files.MANIFEST_NAME).exists():
            return False
        journal = Journal(target)
        activity = journal.activity_lock()
        if not activity.acquire(wait=False):
            return False
        try:
            journal.discard()
            files.remove_files(target, files.all_files(target))
        finally:
            activity.release()
    return True
