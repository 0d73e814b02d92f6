"""`ris demo`: the whole path on a drawn dataset, through the same commands that a user types."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.render import percent, print_table
from ris_cache.errors import ConfigError, RisError

DEFAULT_TRAIN = 2000
NUM_PICTURES = 3
MIN_VAL_OIOU = 0.60
MIN_FALL = 0.20


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for everything the demo makes.")] = Path(
        "demo"
    ),
    train: Annotated[int, typer.Option(min=1, help="Training images to draw.")] = DEFAULT_TRAIN,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; the recipe's by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
) -> None:
    """Draw a dataset, extract, train, evaluate and predict; prints each command it runs.

    Example: ris demo --out ./demo
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty. Remove it, or choose another directory with --out.", path=out)
    started = time.monotonic()
    data, cache, runs = out / "data", out / "feats", out / "runs"
    held_out = max(5, train // 15)

    _ris(
        "data",
        "synth",
        "--out",
        data,
        "--train",
        train,
        "--val",
        held_out,
        "--test",
        held_out // 2,
        "--seed",
        seed,
    )
    _ris(
        "extract", "--split", "refcoco", "--data", data, "--cache", cache, "--preset", "tiny",
        "--random-weights", "--seed", seed, "--batch-size", 32,
    )  # fmt: skip
    chosen_steps = ["--set", f"train.steps={steps}"] if steps is not None else []
    _ris(
        "train", "--cache", cache, "--runs", runs, "--run", "demo", "--random-weights",
        "--set", f"train.seed={seed}", *chosen_steps,
    )  # fmt: skip
    evaluation = ["eval", "--cache", cache, "--runs", runs, "--run", "demo"]
    own = _ris_json(*evaluation)
    shuffled = _ris_json(*evaluation, "--split", "refcoco:val", "--shuffle-expressions", "--seed", seed)
    pictures = []
    for image, text in _examples(data):
        result = _ris_json(
            "predict",
            "--image",
            image,
            "--text",
            text,
            "--runs",
            runs,
            "--run",
            "demo",
            "--out",
            out / "pictures",
        )
        pictures.append((text, result["overlay"]))
    val_oiou, fall = _summarise(own, shuffled, pictures, seconds=time.monotonic() - started)
    is_default = steps is None and train == DEFAULT_TRAIN
    if is_default and (val_oiou < MIN_VAL_OIOU or fall < MIN_FALL):
        raise RisError(
            f"The demo's model should reach val oIoU {MIN_VAL_OIOU} and lose {MIN_FALL} when expressions are "
            f"shuffled; it reached {val_oiou:.3f} and lost {fall:.3f}. Something in the path is broken."
        )


def _summarise(
    own: dict[str, Any], shuffled: dict[str, Any], pictures: list[tuple[str, str]], *, seconds: float
) -> tuple[float, float]:
    """Print the table and what it says; returns val oIoU and how far it falls with shuffled expressions."""
    (mixed,) = shuffled["results"]
    labelled = [(result["split"], result) for result in own["results"]]
    labelled.append((f"{mixed['split']}, expressions shuffled", mixed))
    print_table(
        "The demo's model",
        ["split", "samples", "oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"],
        [
            [
                name,
                str(result["num_samples"]),
                *[percent(result[key]) for key in ("oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9")],
            ]
            for name, result in labelled
        ],
        caption=(
            f"grid: {mixed['grid']} · rules: {mixed['rules']} · mask: {mixed['binarisation']} · "
            f"category source: {mixed['category_source']}"
        ),
    )
    val = next(result for result in own["results"] if result["split"] == mixed["split"])
    print(
        f"val oIoU {val['oIoU']:.3f} with each image's own expressions, {mixed['oIoU']:.3f} with them "
        f"shuffled within the image: the text decides {val['oIoU'] - mixed['oIoU']:.3f} of it."
    )
    print("Overlays:")
    for text, path in pictures:
        print(f'  {path}  "{text}"')
    weights = ", ".join(f"{role} {label}" for role, label in own["weights"].items())
    print(
        f"Random: the encoders and BERT before training ({weights}) and the drawn scenes. Real: "
        f"file formats, architectures (preset tiny), training, scores and masks. {seconds:.0f} s."
    )
    return val["oIoU"], val["oIoU"] - mixed["oIoU"]


def _examples(data: Path) -> list[tuple[Path, str]]:
    """The first expression of the first refs of different validation images."""
    from ris_cache.datasets import ImageRoots, select_split
    from ris_cache.datasets.load import load_dataset

    dataset = load_dataset(data, "refcoco", "unc")
    firsts = {expression.image_id: expression for expression in reversed(select_split(dataset, "val"))}
    image_ids = sorted(firsts)[:NUM_PICTURES]
    paths = ImageRoots(data).resolve(dataset.images[image_id] for image_id in image_ids)
    return [(paths[image_id], firsts[image_id].sent) for image_id in image_ids]


def _ris(*arguments: object) -> None:
    """Run one `ris` command, shown as a user would type it."""
    _run(arguments, capture=False)


def _ris_json(*arguments: object) -> Any:
    """Run one `ris` command with --json and parse what it prints."""
    return json.loads(_run((*arguments, "--json"), capture=True))


def _run(arguments: tuple[object, ...], *, capture: bool) -> str:
    words = [str(argument) for argument in arguments]
    print(f"\n$ ris {shlex.join(words)}", flush=True)
    finished = subprocess.run(
        [sys.executable, "-m", "cli", *words],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        check=False,
    )
    if finished.returncode != 0:
        raise RisError(f"`ris {words[0]}` ended with exit code {finished.returncode}; see above.")
    return finished.stdout or ""
