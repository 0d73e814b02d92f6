"""Converting a cache: the same images in another backend, precision or shard size, in a new directory.

Nothing is lost between backends, nor from a precision to float32, which holds every value of the others. What
did lose something on the way stands in the fingerprint (`rounded_through`), so that two caches have the same
fingerprint only if their features were rounded alike: float32 converted to float16 is what an extraction in
float16 gives, float16 converted to float32 is not what one in float32 gives, and going back is exact again.

A source that has grown is converted into the same directory again: what the earlier result lacks is added to
it, as an extraction adds to a cache, so whoever reads it meanwhile is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ris_cache.errors import ConfigError, NonFiniteError
from ris_cache.progress import Progress
from ris_cache.store import files
from ris_cache.store.backends import make_backend
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe, metadata_paths
from ris_cache.store.earlier import identity, outcome, why_not_earlier
from ris_cache.store.fingerprint import converted_fingerprint, lossy, rounded_through
from ris_cache.store.journal import Journal, Plan
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import Manifest, SplitCounts
from ris_cache.store.planning import NewImage, is_carried_out, load_base
from ris_cache.store.tables import CachedImage
from ris_cache.store.transfer import as_new, copy_annotations, origins, transfer

PURPOSE = "cache convert"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What a conversion is to do; `plan_conversion` makes and checks it.

    Attributes:
        recipe: of the new cache.
        earlier: what an earlier conversion left in `target`, as it was before; None if there is no cache.
        missing: images that `earlier` lacks, by row of the source.
    """

    source: FeatureCache
    target: Path
    recipe: Recipe
    earlier: FeatureCache | None
    missing: tuple[CachedImage, ...]

    @property
    def is_exact(self) -> bool:
        """Whether features decode to the same values afterwards."""
        before = self.source.manifest.dtype
        if self.recipe.dtype in (before, "float32"):
            return True
        return self.rounded_through != (*rounded_through(self.source.fingerprint), *lossy(before))

    @property
    def rounded_through(self) -> tuple[str, ...]:
        """Precisions that features were rounded to before, in this order; part of the fingerprint."""
        return rounded_through(self.recipe.fingerprint)

    @property
    def has_everything(self) -> bool:
        """Whether `earlier` has all images, splits and category sets of the source."""
        if self.earlier is None or self.missing:
            return False
        before, wanted = self.earlier.manifest, self.source.manifest
        return before.category_sets == wanted.category_sets and _splits(before) == _splits(wanted)

    @property
    def num_shards(self) -> int:
        """Shards of the new cache that hold images."""
        shard_rows = self.recipe.shard_rows
        known = self.earlier.images.values() if self.earlier else ()
        shards = {image.row // shard_rows for image in known}
        if not self.keeps_rows:
            return len(shards) + -(-len(self.missing) // shard_rows)
        return len(shards | {image.row // shard_rows for image in self.missing})

    @property
    def num_bytes(self) -> int:
        """Bytes of features in the new cache."""
        return len(self.source) * self.recipe.image_bytes

    @property
    def keeps_rows(self) -> bool:
        """Whether every missing image gets the row that it has, past those of `earlier`."""
        first_row = self.earlier.manifest.rows if self.earlier else 0
        return self.recipe.shard_rows == self.source.manifest.shard_rows and all(
            image.row >= first_row for image in self.missing
        )

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
        target: a new or empty directory, one in which the same conversion was cut off or is under way, or
            the result of an earlier conversion of the source, which has grown since.
        backend, shard_rows: of the new cache; by default those of the earlier result, or of the source.
        dtype: of the new cache; by default that of the source.

    Raises:
        ConfigError: a target that holds something else, or lies inside the source; an unknown backend or
            precision.
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
    base = load_base(target)
    earlier = FeatureCache.open(target) if base else None
    found, layout = Recipe.of(cache.manifest), base or cache.manifest
    recipe = replace(
        found,
        fingerprint=converted_fingerprint(cache.fingerprint, dtype or found.dtype),
        backend=backend or layout.backend,
        dtype=dtype or found.dtype,
        shard_rows=shard_rows or layout.shard_rows,
    )
    make_backend(recipe.backend, target, recipe.arrays, recipe.shard_rows)  # refuses unknown names
    missing = _missing(cache, earlier.images if earlier else {})
    conversion = Conversion(source=cache, target=target, recipe=recipe, earlier=earlier, missing=missing)
    _require_fitting_target(conversion)
    return conversion


def convert(
    conversion: Conversion,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, Manifest]:
    """Write the new cache, or what an earlier one lacks, going on where a conversion was cut off.

    Tables, category sets, SAM's heads and quarantined images come along.

    Returns:
        How many images this process copied, and the manifest of the new cache.

    Raises:
        NonFiniteError: a value that the new precision cannot hold; the target is left empty, or as it was.
        ConfigError: the target has been taken meanwhile.
        CacheError, CorruptShardError, DiskFullError, StoppedError: as `transfer`.
    """
    source, target, recipe = conversion.source, conversion.target, conversion.recipe
    shard_rows, num_rows = source.manifest.shard_rows, source.manifest.rows

    def choose(known: Mapping[int, CachedImage]) -> list[NewImage]:
        _require_fitting_target(conversion)  # again, now that no other process can take it
        missing = _missing(source, known)
        keeps_rows = recipe.shard_rows == shard_rows and _are_rows_free(target, missing)
        return [as_new(image, row=image.row if keeps_rows else None) for image in missing]

    def edit(draft: CacheDraft) -> None:
        copy_annotations(draft, source)
        if num_rows and recipe.shard_rows == shard_rows and _rows(draft.images) == _rows(source.images):
            # Rows at the end may have lost their images; the arrays stay as long as they are.
            draft.add_shard(num_rows // shard_rows - 1, {}, ())

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
        if not _give_up(target):
            remedy = f"Other processes still write to {target}: name another directory with such a --dtype."
        elif (target / files.MANIFEST_NAME).exists():
            remedy = f"{target} is as it was: name another directory with such a --dtype."
        else:
            remedy = f"Nothing is kept in {target}: run the command again with such a --dtype."
        raise NonFiniteError(f"{error} {remedy}", **error.facts) from error


def _missing(source: FeatureCache, known: Mapping[int, CachedImage]) -> tuple[CachedImage, ...]:
    """Return images that are not known, or of which more is known by now than that they are quarantined."""
    return tuple(
        image
        for image in sorted(source.images.values(), key=lambda image: image.row)
        if (found := known.get(image.image_id)) is None
        or (found.is_quarantined and outcome(found) != outcome(image))
    )


def _are_rows_free(target: Path, missing: Sequence[CachedImage]) -> bool:
    """Whether images can have the rows that they have in the source: in shards that nobody has written."""
    base, journal = load_base(target), Journal(target)
    plan = journal.read_plan()
    shards = plan.shards() if plan else {}
    taken = journal.committed(shards)
    done = {image.image_id for shard in taken for image in shards[shard]}
    first_row = base.rows if base else 0
    return all(
        image.row >= first_row and (plan is None or image.row // plan.shard_rows not in taken)
        for image in missing
        if image.image_id not in done
    )


def _require_fitting_target(conversion: Conversion) -> None:
    """Refuse a target that holds anything but this conversion, of the source as it is or as it was."""
    target = conversion.target
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a directory for the new cache.", path=target)
    names = {path.name for path in target.iterdir()} if target.exists() else set()
    base = load_base(target)
    plan = Journal(target).read_plan()
    if base is not None:
        problem = why_not_earlier(conversion, FeatureCache.open(target))
        if problem is not None:
            raise ConfigError(
                f"{target} holds a cache already, which is no earlier conversion of "
                f"{conversion.source.root}: {problem}. Name a new directory; nothing was changed.",
                path=target,
                reason=problem,
            )
    if plan is not None:
        if not is_carried_out(plan, target, base) and not _is_part(conversion, plan):
            described = ", ".join(f"{name} {value}" for name, value in plan.request.items())
            raise ConfigError(
                f"{target} holds an unfinished `ris {plan.purpose}` of something else ({described}). Finish "
                "it with the same command, or name another directory.",
                path=target,
                request=dict(plan.request),
            )
    elif base is None and names and not names & {files.LOCK_NAME, files.EXTRACTION_NAME}:
        raise ConfigError(
            f"{target} is not empty. Name a new or empty directory; nothing was changed.", path=target
        )


def _is_part(conversion: Conversion, plan: Plan) -> bool:
    """Whether an unfinished plan makes what this conversion makes, or some of it: the source grew since."""
    if plan.request == conversion.request:
        return True
    recipe, images = conversion.recipe, conversion.source.images
    if (plan.purpose, plan.fingerprint.digest, plan.backend, plan.shard_rows) != (
        PURPOSE,
        recipe.fingerprint.digest,
        recipe.backend,
        recipe.shard_rows,
    ):
        return False
    records = Journal(conversion.target).records(sorted(plan.shards()))
    return all(
        image.image_id in images and identity(image) == identity(images[image.image_id])
        for image in plan.images
    ) and all(
        (image.sha256, image.reason) == outcome(images[image.image_id])
        for record in records
        for image in record.images
    )


def _splits(manifest: Manifest) -> dict[str, dict[str, SplitCounts]]:
    return {name: entry.splits for name, entry in manifest.datasets.items()}


def _rows(images: Mapping[int, CachedImage]) -> dict[int, int]:
    return {image_id: image.row for image_id, image in images.items()}


def _give_up(target: Path) -> bool:
    """Remove what can never be finished; False if another process works on it."""
    with FileLock(target / files.LOCK_NAME):
        journal = Journal(target)
        activity = journal.activity_lock()
        if not activity.acquire(wait=False):
            return False
        try:
            base = load_base(target)
            journal.discard()
            left = files.all_files(target)
            if base is not None:
                left = {path: left[path] for path in left if _is_leftover(path, base)}
            files.remove_files(target, left)
        finally:
            activity.release()
    return True


def _is_leftover(relative: str, base: Manifest) -> bool:
    """Whether a file is of a shard that never entered the cache."""
    features = tuple(f"{name}/" for name in files.FEATURE_DIRECTORIES)
    return relative.startswith(features) and relative not in {*base.files, *metadata_paths(base)}
