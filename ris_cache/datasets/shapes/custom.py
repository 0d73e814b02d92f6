"""Write a drawn custom dataset: one expression a line, with every way of giving a mask.

<root>/custom/drawn.jsonl                                    the expressions
<root>/custom/drawn/<split>_<6 digits>.jpg                   the images
<root>/custom/drawn/masks/<split>_<6 digits>_<object>.png    some of the masks: 255 on the object
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.shapes.compose import POOLS, ComposedImage
from ris_cache.datasets.shapes.layouts import CUSTOM, ShapesSummary, put_image, write_whole
from ris_cache.datasets.shapes.mixture import PLAIN_SHARES, Ref, Sentence, Shares, mixed_refs
from ris_cache.datasets.shapes.rows import Place, Row, SplitCounts, polygons_of

CUSTOM_NAME = "drawn"

_LANGUAGE = 6
_FORMS = ("polygons", "rle", "mask")


@dataclass(slots=True, kw_only=True)
class CustomLayoutWriter:
    """Writes the drawn dataset as JSON Lines.

    Attributes:
        shares: by split; `PLAIN_SHARES` for splits not there.
    """

    root: Path
    seed: int
    shares: Mapping[str, Shares] = field(default_factory=dict)
    _lines: list[Row] = field(default_factory=list, init=False)
    _counts: dict[str, Counter[str]] = field(default_factory=dict, init=False)

    @property
    def pool(self) -> str:
        """The pool whose images it takes: its own."""
        return CUSTOM

    @property
    def annotation_paths(self) -> tuple[Path, ...]:
        """The file of lines."""
        return (self.root / CUSTOM / f"{CUSTOM_NAME}.jsonl",)

    def add(self, composed: ComposedImage, jpeg: bytes, place: Place) -> None:
        """Write the image and mask files, and keep the lines; an image without lines is left out."""
        number = POOLS[CUSTOM].index(place.split)
        rng = np.random.default_rng((self.seed, tuple(POOLS).index(CUSTOM), number, place.index, _LANGUAGE))
        stem = f"{place.split}_{place.index:06d}"
        refs = mixed_refs(rng, composed, self.shares.get(place.split, PLAIN_SHARES))
        if not refs:
            return
        put_image(self.root / CUSTOM / CUSTOM_NAME / f"{stem}.jpg", jpeg)
        for ref in refs:
            for sentence in ref.sentences:
                self._lines.append(self._line(rng, composed, ref, sentence, stem) | {"split": place.split})
        self._count(composed, refs, place.split)

    def finish(self) -> tuple[ShapesSummary, ...]:
        """Write the lines."""
        (path,) = self.annotation_paths
        write_whole(path, "".join(f"{json.dumps(line)}\n" for line in self._lines).encode())
        return (
            ShapesSummary(
                layout=CUSTOM,
                split_by=CUSTOM_NAME,
                refs_path=path,
                instances_path=None,
                images_dir=self.root / CUSTOM / CUSTOM_NAME,
                splits={split: SplitCounts(**counts) for split, counts in self._counts.items()},
            ),
        )

    def _line(
        self, rng: np.random.Generator, composed: ComposedImage, ref: Ref, sentence: Sentence, stem: str
    ) -> Row:
        line: Row = {"image": f"{CUSTOM_NAME}/{stem}.jpg", "expression": sentence.raw}
        if " ".join(sentence.raw.lower().split()) != sentence.sent:
            line["sent"] = sentence.sent
        targets = [self._target(rng, composed, index, stem) for index in ref.object_indices]
        if len(targets) == 1:
            return line | targets[0]
        if targets or rng.random() < 0.5:
            line["targets"] = targets
        return line

    def _target(self, rng: np.random.Generator, composed: ComposedImage, index: int, stem: str) -> Row:
        """One object in a form drawn by lot, with its category's name."""
        form = _FORMS[int(rng.integers(len(_FORMS)))]
        target: Row = {"category": composed.drawing.scene.objects[index].shape}
        if form == "polygons":
            return target | {"polygons": polygons_of(composed, index)}
        mask = composed.drawing.labels == index
        if form == "rle":
            encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            height, width = (int(side) for side in encoded["size"])
            return target | {"rle": {"size": [height, width], "counts": encoded["counts"].decode("ascii")}}
        relative = f"{CUSTOM_NAME}/masks/{stem}_{index}.png"
        encoded_png = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8) * 255).save(encoded_png, "PNG")
        put_image(self.root / CUSTOM / relative, encoded_png.getvalue())
        return target | {"mask": relative}

    def _count(self, composed: ComposedImage, refs: tuple[Ref, ...], split: str) -> None:
        """Each line is a ref of its own."""
        kinds = Counter[str]()
        for ref in refs:
            kinds[("none", "one", "many")[min(len(ref.object_indices), 2)]] += len(ref.sentences)
        self._counts.setdefault(split, Counter(none=0, one=0, many=0)).update(
            images=1, instances=len(composed.drawing.scene.objects), refs=kinds.total(), **kinds
        )
