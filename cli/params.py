"""`ris params`: parameter counts beside the paper's Table 2."""

from __future__ import annotations

from cli.options import JsonOption, PresetOption
from cli.render import print_json, print_table
from ris_cache.errors import ConfigError


def params(preset: PresetOption = "paper", json: JsonOption = False) -> None:
    """Count the parameters of every part, without allocating them, beside the supplement's Table 2.

    Example: ris params --preset paper
    """
    from ris_cache.encoders.spec import PRESETS
    from ris_train.config import load_config

    if preset not in PRESETS:
        raise ConfigError(f"Unknown preset {preset!r}; there are {', '.join(PRESETS)}.", preset=preset)
    from ris_train.params import count_parameters

    rows = count_parameters(PRESETS[preset], load_config(recipe=preset).model)
    if json:
        print_json(
            [
                {"name": row.name, "parameters": row.count, "frozen": row.is_frozen, "paper": row.paper}
                for row in rows
            ]
        )
        return
    print_table(
        f"Parameters of preset {preset}, in millions",
        ["part", "state", "ours", "paper, Table 2", "count", "note"],
        [
            [
                row.name,
                "frozen" if row.is_frozen else "trainable",
                row.millions,
                row.paper or "-",
                f"{row.count:,}",
                row.note,
            ]
            for row in rows
        ],
        left=("state", "note"),
    )
