"""Every rule set by name, which one a dataset has by default, and how a command line names them."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Final

from ris_cache.errors import ConfigError
from ris_train.scoring.arithmetic import IouRule, PrecisionRule
from ris_train.scoring.rule_set import RuleSet, Scores, Source
from ris_train.scoring.views import VIEWS

__all__ = ["RULES", "RuleSet", "Scores", "default_rules", "rules_named"]

_PRECISION: Final = PrecisionRule()
_PRECISION_SINGLE: Final = PrecisionRule(is_single=True)
_PRECISION_STRICT: Final = PrecisionRule(is_strict=True, is_single=True)
_PRECISION_HIGH: Final = PrecisionRule(thresholds=(0.7, 0.8, 0.9))
_LARGE_SUMS: Final = "pixel sums and the sum of IoUs in float32"

_RIS = RuleSet(
    name="ris",
    view=VIEWS["original"],
    metrics=("oIoU", "mIoU", *_PRECISION.names),
    headline="oIoU",
    no_target="refused",
    head="ignored",
    iou=IouRule(),
    precision=_PRECISION,
    source=Source(
        project="ours",
        repository="",
        evaluates="RefCOCO, RefCOCO+, RefCOCOg",
        sentences="all",
        scale="%",
        not_reproduced="",
    ),
)

_LAVT = replace(
    _RIS,
    name="lavt",
    view=VIEWS["480-nearest-one"],
    source=Source(
        project="LAVT",
        repository="yz93/LAVT-RIS",
        evaluates="RefCOCO, RefCOCO+, RefCOCOg",
        sentences="all, as typed (one at random per ref while training)",
        scale="%",
        not_reproduced="arg-max over two channels, enlarged with aligned corners",
    ),
)

_DMMI = replace(
    _RIS,
    name="dmmi",
    view=VIEWS["480-nearest"],
    metrics=(*_RIS.metrics, "Acc"),
    no_target="apart",
    source=Source(
        project="DMMI",
        repository="toggle1995/RIS-DMMI",
        evaluates="Ref-ZOM; RefCOCO family as lavt, but for overlapping parts",
        sentences="all, as typed",
        scale="%",
        not_reproduced="arg-max over two channels, enlarged with aligned corners",
    ),
)

_ZOM = replace(
    _DMMI,
    name="zom",
    head="empties",
    source=replace(_RIS.source, evaluates="Ref-ZOM: dmmi, and a no-target head counts"),
)

_GRES = RuleSet(
    name="gres",
    view=VIEWS["original"],
    metrics=("gIoU", "cIoU", "N-acc", "T-acc", *_PRECISION_HIGH.names),
    headline="gIoU",
    no_target="classified",
    head="decides",
    iou=IouRule(),
    precision=_PRECISION_HIGH,
    source=replace(_RIS.source, evaluates="gRefCOCO"),
)

_RELA = replace(
    _GRES,
    name="rela",
    view=VIEWS["480"],
    no_accuracy_is_zero=True,
    source=Source(
        project="ReLA (GRES)",
        repository="henghuiding/ReLA",
        evaluates="gRefCOCO, RefCOCO family",
        sentences="all, as typed",
        scale="%; N-acc and T-acc 0–1",
        not_reproduced="arg-max over two sigmoid channels; scores pooled over several sources",
    ),
)

_DFAM = RuleSet(
    name="dfam",
    view=VIEWS["1024"],
    metrics=("oIoU", "mIoU", "gIoU", *_PRECISION_SINGLE.names),
    headline="oIoU",
    no_target="alike",
    head="empties",
    iou=IouRule(epsilon=1e-6, is_single=True),
    giou=IouRule(epsilon=1e-5, is_single=True, empty=1.0),
    precision=_PRECISION_SINGLE,
    is_single_mean=True,
    source=Source(
        project="DFAM",
        repository="hitachi-rd-cv/dfam",
        evaluates="RefCOCO family, gRefCOCO",
        sentences="all, as typed",
        scale="%",
        not_reproduced="a running sum of IoUs in float32",
    ),
)

_DFAM_ZOM = replace(
    _DFAM,
    name="dfam-zom",
    metrics=(*_DFAM.metrics, "Acc"),
    no_target="apart",
    acc_epsilon=1e-4,
    precision=None,
    giou=None,
    constants=("gIoU", *_PRECISION_SINGLE.names),
    source=replace(
        _DFAM.source,
        evaluates="Ref-ZOM",
        not_reproduced="Acc on k processes: k times too high, since hits are summed over them and samples "
        "are not; a crash on a process without targeted samples; a running sum of IoUs in float32",
    ),
)

_LISA = RuleSet(
    name="lisa",
    view=VIEWS["original-one"],
    metrics=("gIoU", "cIoU"),
    headline="gIoU",
    no_target="alike",
    head="ignored",
    iou=IouRule(epsilon=1e-5, is_single=True, empty=1.0),
    precision=None,
    count_epsilon=1e-5,
    sum_epsilon=1e-10,
    source=Source(
        project="LISA",
        repository="dvlab-research/LISA",
        evaluates="RefCOCO family",
        sentences="all, as cleaned, in lower case",
        scale="0–1",
        not_reproduced=_LARGE_SUMS,
    ),
)

_EVF_SAM = replace(
    _LISA,
    name="evf-sam",
    iou=IouRule(epsilon=1e-10, is_single=True, empty=1.0),
    source=replace(
        _LISA.source,
        project="EVF-SAM",
        repository="hustvl/EVF-SAM",
        scale="0–1, three decimals",
        not_reproduced=f"images repeated so that all processes have as many; {_LARGE_SUMS}",
    ),
)

_CRIS = replace(
    _RIS,
    name="cris",
    view=VIEWS["original-p35"],
    metrics=("mIoU", *_PRECISION_STRICT.names),
    headline="mIoU",
    iou=IouRule(epsilon=1e-6),
    precision=_PRECISION_STRICT,
    source=Source(
        project="CRIS",
        repository="DerrickWang005/CRIS.pytorch",
        evaluates="RefCOCO family",
        sentences="all, as cleaned (the first of each ref while training)",
        scale="%",
        not_reproduced="probabilities warped back with cubic interpolation",
    ),
)

_CGFORMER = replace(
    _CRIS,
    name="cgformer",
    view=VIEWS["original-one"],
    metrics=("oIoU", *_CRIS.metrics),
    headline="oIoU",
    source=Source(
        project="CGFormer",
        repository="SooLab/CGFormer",
        evaluates="RefCOCO family",
        sentences="all, as cleaned (the last of each ref, at 480 × 480, while training)",
        scale="%",
        not_reproduced="probabilities enlarged with cubic interpolation",
    ),
)


def _on(rules: RuleSet, grid: str) -> RuleSet:
    return replace(rules, name=f"{rules.name}@{grid}", view=VIEWS[grid])


RULES: Final[dict[str, RuleSet]] = {
    rules.name: rules
    for rules in (
        _RIS,
        _on(_RIS, "1024"),
        _on(_RIS, "480"),
        _GRES,
        _on(_GRES, "1024"),
        _on(_GRES, "480"),
        _ZOM,
        _DFAM,
        _DFAM_ZOM,
        _LAVT,
        _DMMI,
        _RELA,
        _LISA,
        _EVF_SAM,
        _CRIS,
        _CGFORMER,
    )
}
"""Every rule set by name: ours first, then those of released evaluators."""

_DEFAULTS: Final = {
    "refcoco": "ris",
    "refcoco+": "ris",
    "refcocog": "ris",
    "grefcoco": "gres",
    "ref-zom": "zom",
}


def default_rules(dataset: str, *, has_no_target: bool) -> str:
    """Name the rule set by which a dataset is scored unless another is asked for.

    Args:
        dataset: `refcoco`, …; any other name is a custom dataset.
        has_no_target: whether the samples of a custom dataset include no-target ones.
    """
    return _DEFAULTS.get(dataset, "gres" if has_no_target else "ris")


def rules_named(text: str) -> tuple[RuleSet, ...]:
    """Find rule sets by their names.

    Args:
        text: `all`, or names separated by commas, such as `ris,dfam`.

    Returns:
        In the order named, each once.

    Raises:
        ConfigError: a name that is none, or no name at all.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return tuple(RULES.values())
    if not names:
        raise ConfigError(f"No rule set is named. Known: all, {', '.join(RULES)}.", found=text)
    for name in names:
        if name not in RULES:
            close = difflib.get_close_matches(name, [*RULES, "all"], n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"There is no rule set {name!r}.{hint} Known: {', '.join(RULES)}; or all, alone.", found=name
            )
    return tuple(RULES[name] for name in dict.fromkeys(names))
