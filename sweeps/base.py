"""What sweep files share, no sweep itself: runs on the known-truth log, and the options of a report on one axis."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from recscale.scaling.training import get_config


def known_truth(architecture: str, preset: str, world: Mapping[str, Any] | None = None, **training: Any) -> ConfigDict:
    """The configuration of a run on a preset of the known-truth log.

    Unless `training` says otherwise: a million rows, one pass, 512 requests of one candidate a step, rate 3e-3.

    Args:
        world: fields of the log's own configuration, laid over the preset.
        training: settings of the section `training`.
    """
    config = get_config(architecture, "known_truth")
    config.data.preset = preset
    config.data.overrides = ConfigDict(world or {})
    config.training.update(training)
    return config


def power_law(axis: str, *, hold_out: bool = True) -> dict[str, Any]:
    """Options of a report that fits logloss = E + a axis^-alpha.

    hold_out: whether the largest size is left out and predicted; not where there are too few sizes, or only one, which
    is no law: then tables and paired differences are what the report is for.
    """
    options = {"form": "power_offset", "axes": {"N": axis}, "target": "logloss"}
    return options if hold_out else options | {"hold_out_largest": False}
