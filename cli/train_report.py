"""What `ris train` prints at its end, and what it would do instead of beginning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cli.render import percent, print_json, print_table

if TYPE_CHECKING:
    from ris_train.config import RunConfig
    from ris_train.data.merge import TrainingSet
    from ris_train.training import TrainingReport
    from ris_train.training.plan import Plan


def print_report(report: TrainingReport, config: RunConfig, *, json: bool) -> None:
    """Print what a run came to, as tables or as JSON."""
    from ris_train.scoring import RULES

    if json:
        print_json(
            {
                "run": str(report.run.path),
                "best_step": report.best_step,
                "rules": report.best.rules,
                "headline": report.headline,
                "val": report.val_label,
                **report.best.values,
                "num_samples": report.best.num_samples,
                "category_source": report.category_source,
                "weights": report.weights,
                "seconds": report.seconds,
                "left_out": report.training_set.left_out,
                "left_out_for_leakage": report.training_set.left_out_for_leakage,
                "num_train_samples": len(report.training_set.samples),
                "training_set": [part.as_dict() for part in report.training_set.parts],
            }
        )
        return
    view = RULES[report.best.rules].view
    print_table(
        f"Run {report.run.path}",
        ["what", "value"],
        [
            ["best step", f"{report.best_step} of {config.train.steps}"],
            *[
                [f"{name} on {report.val_label}", percent(value)]
                for name, value in report.best.values.items()
            ],
            ["seconds", f"{report.seconds:.0f}"],
            ["checkpoint", str(report.run.checkpoint_path("best"))],
        ],
        caption=(
            f"{report.best.num_samples} of {report.val_size} expressions · best by: {report.headline} · "
            f"rules: {report.best.rules} · grid: {view.grid} · threshold: {view.threshold} · "
            f"category source: {report.category_source} · weights: "
            + ", ".join(f"{role} {label}" for role, label in report.weights.items())
        ),
    )
    _print_training_set(report.training_set)


def print_plan(plan: Plan, *, json: bool) -> None:
    """Print what a run would do, as tables or as JSON."""
    if json:
        print_json(plan.as_dict())
        return
    memory = plan.memory
    sizes = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimiser,
        "activations": memory.activations,
        "memory": memory.total,
    }
    print_table(
        "Dry run: nothing was written",
        ["what", "value"],
        [
            ["expressions", f"{plan.num_samples:,}"],
            ["steps", f"{plan.steps:,} of {plan.batch_size} expressions, {plan.samples_at_once} at once"],
            *([["steps taken before", f"{plan.steps_taken:,}"]] if plan.steps_taken else []),
            ["epochs", f"{plan.epochs:.1f}"],
            ["validation", f"{plan.val_label}, {plan.val_size:,} expressions"],
            [
                "cut expressions",
                f"{plan.num_cut['train']:,} to train on, {plan.num_cut['val']:,} to validate on, after "
                f"{plan.max_tokens} word pieces",
            ],
            *[[name, f"{size / 2**30:.2f} GiB"] for name, size in sizes.items()],
        ],
        caption="memory: of one process with the whole batch, in fp32; activations measured on one "
        "expression and multiplied; buffers of single operations come on top",
    )
    names = list(dict.fromkeys([*plan.trained, *plan.frozen]))
    print_table(
        "What trains",
        ["module", "trained", "frozen"],
        [
            *[[name, f"{plan.trained.get(name, 0):,}", f"{plan.frozen.get(name, 0):,}"] for name in names],
            ["all", f"{sum(plan.trained.values()):,}", f"{sum(plan.frozen.values()):,}"],
        ],
    )
    _print_training_set(plan.training_set)


def _print_training_set(training_set: TrainingSet) -> None:
    """Print what was trained on, and the leakage where there is any or where a merge looked for it."""
    parts = training_set.parts
    columns = ["split", "expressions", "images", "no target", "degenerate", "unreadable"]
    rows = [
        [part.selection, *map(str, (part.expressions, part.images))]
        + [str(left_out) for left_out in (part.no_target, part.degenerate, part.quarantined)]
        for part in parts
    ]
    caption = ""
    is_filtered = any(part.is_filtered for part in parts)
    if is_filtered or any(part.leaking_images for part in parts):
        columns += ["leaking", "on images"]
        for row, part in zip(rows, parts, strict=True):
            row += [str(part.leaking_expressions), str(part.leaking_images)]
        caption = (
            "leaking: on an image that a validation or test split of the cache holds; these expressions were "
            + ("left out" if is_filtered else "kept")
        )
        for part in parts:
            shared = ", ".join(f"{count} with {name}" for name, count in part.shared.items())
            caption += f" · {part.selection} shares images: {shared or 'none'}"
    num_samples, usable = len(training_set.samples), sum(part.expressions for part in parts)
    only = f" the first {num_samples} of these, by train.overfit" if num_samples < usable else ""
    print_table(f"Trained on{only}; columns after images count expressions left out", columns, rows, caption)
