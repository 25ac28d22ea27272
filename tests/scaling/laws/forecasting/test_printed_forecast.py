"""A forecast that was laid out by hand, as it is printed and as plain data."""

import click
import pandas as pd
import pytest

from recscale.scaling.laws import commands
from recscale.scaling.laws.forecasting import forecast_command
from recscale.scaling.laws.forecasting.forecast import Forecast

ENDS = dict(low=0.45, high=0.55, wide_low=0.4, wide_high=0.6)


def found(points, held_out=()):
    columns = ["p", "ratio", "predicted", "low", "high", "wide_low", "wide_high"]
    calibration = pd.DataFrame(
        [("up to x2", 20, 0.9, 0, None, 1.5), ("up to x10", 0, None, 4, 0.25, None)],
        columns=["ratio", "rolling_rows", "rolling_inside", "held_out_rows", "held_out_inside", "widening"],
    )
    held = pd.DataFrame(list(held_out), columns=[*columns, "actual", "inside"])
    asked = pd.DataFrame(list(points), columns=columns)
    return Forecast(
        "p", 1e5, "logloss", {"power": 0.75, "kappa": 0.25}, {"m4": "too far"}, held, asked, calibration, {}
    )


def test_a_forecast_is_printed_point_by_point(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    one = found(
        [(2e5, 2.0, 0.5, *ENDS.values()), (9e9, 9e4, *[float("nan")] * 5)],
        [(3e5, 3.0, 0.52, 0.5, 0.54, *[float("nan")] * 2, 0.51, True)],
    )
    forecast_command._print(one, forecast_command._plain(one))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "logloss below p = 1e+05, stacked over power (0.75), kappa (0.25)",
        "m4 rejected: too far",
        "3e+05 x3 0.52 0.5 to 0.54 0.51",
        "2e+05 x2 0.5 0.45 to 0.55 0.4 to 0.6",
        "9e+09 x9e+04 refused",
        "up to x2 0.90 of 20 no rows x1.50",
        "up to x10 no rows 0.25 of 4 too few rows",
    ):
        assert line in lines, (line, lines)
    assert not any("more rows" in line for line in lines)
    many = found([(float(k), 2.0, 0.5, *ENDS.values()) for k in range(1, 24)])
    forecast_command._print(many, forecast_command._plain(many))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "and 3 more rows (all are in the JSON)" in lines and "23 x2 0.5 0.45 to 0.55 0.4 to 0.6" in lines
    assert "4 x2 0.5 0.45 to 0.55 0.4 to 0.6" in lines and "3 x2 0.5 0.45 to 0.55 0.4 to 0.6" not in lines
    plain = forecast_command._plain(one)
    assert (plain["axis"], plain["cut"], plain["weights"]) == ("p", 1e5, {"power": 0.75, "kappa": 0.25})
    assert len(plain["held_out"]) == 1 and len(plain["points"]) == 2 and len(plain["calibration"]) == 2


def test_areas_under_the_curve_stand_beside():
    row = {"p": 2e5, "ratio": 2.0, "predicted": 0.5, **ENDS, "auc": 0.7, "auc_low": 0.69, "auc_high": 0.71}
    told = forecast_command._row(row, ["p"], True)
    assert told == ["2e+05", "x2", "0.5", "0.45 to 0.55", "0.4 to 0.6", "", "0.7", "0.69 to 0.71"]
    assert forecast_command._row({**row, "auc": None, "auc_low": None}, ["p"], True)[-2:] == ["", ""]


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--fix", "E=.42", {"E": 0.42}),
        ("--fix", "E=@floor", {"E": "@floor"}),
        ("--bound", "alpha=0,2", {"alpha": (0.0, 2.0)}),
        ("--prior", "alpha=normal,.3,.1", {"alpha": ("normal", 0.3, 0.1)}),
        *((option, text, None) for option, text in (
            ("--fix", "E"), ("--fix", "=1"), ("--fix", "E=1,2"), ("--fix", "E=nan"), ("--bound", "alpha=1"),
            ("--bound", "alpha=@floor"), ("--prior", "alpha=.3,.1"), ("--prior", "alpha=normal,.3,wide"),
        )),
    ],
)  # fmt: skip
def test_what_is_known_of_parameters_is_read_from_texts(option, text, told):
    parameter = click.Option([option], multiple=True)
    context = click.Context(click.Command("fit"))
    if told is None:
        with pytest.raises(click.UsageError, match="cannot be read; write it as"):
            commands._given(context, parameter, (text,))
    else:
        assert commands._given(context, parameter, (text,)) == told and commands._given(context, parameter, ()) == {}
