"""The card of a stored log as tables: on the terminal, and on a page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from recscale.scaling.data.stored_log.describe import LEAK_AUC

from .page_environment import page_environment

_MOST_LEAKS = 8

# Title, names of the columns, rows of cells.
Table = tuple[str, list[str], list[list[str]]]


def card_tables(card: dict[str, Any]) -> list[Table]:
    """The card's figures, laid out."""
    items, users, candidates = card["items"], card["users"], card["candidates"]
    sizes = [
        ["rows", f"{card['rows']:,}"],
        ["requests", f"{card['requests']:,}"],
        ["candidates per request", f"{candidates['mean']:.3g} (most {candidates['max']})"],
        ["users", "none" if users is None else f"{users:,}"],
        ["items", "none" if items is None else f"{items['values']:,} ({items['field']})"],
        ["identity", card["identity"]],
    ]
    splits = [[name, f"{split['rows']:,}", *(split["times"] or ["", ""])] for name, split in card["splits"].items()]
    labels = [
        [name, _percent(label["observed_share"]), *(_number(label["base_rate"].get(part)) for part in card["splits"]),
         _number(label["entropy"]), " ".join(_number(rate, 2) for rate in label["over_time"])]
        for name, label in card["labels"].items()
    ]  # fmt: skip
    ids = [
        [f["name"], f["side"], f["kind"], f"{f['vocabulary']:,}", _percent(f["coverage"]),
         _percent(f["unknown"]["valid"]), _percent(f["unknown"]["test"]), _percent(f["top_share"])]
        for f in card["fields"] if f["kind"] != "dense"
    ]  # fmt: skip
    dense = [
        [f["name"], f["side"], str(f["width"]), _listed(f["raw_quantiles"]), _listed(f["quantiles"])]
        for f in card["fields"]
        if f["kind"] == "dense"
    ]
    histories = [
        [name, f"{h['events']:,}", _listed(h["length"].values()), _percent(h["empty_share"]),
         _listed(h.get("newest_age_s", {}).values()), str(h.get("future_events", ""))]
        for name, h in card["histories"].items()
    ]  # fmt: skip
    leaks = [
        [row["task"], row["input"], f"{row['auc']:.4f}", "LEAK?" if row["auc"] > LEAK_AUC else ""]
        for row in card["leaks"][:_MOST_LEAKS]
    ]
    references = [
        [name, *(_number(found[metric]) for metric in ("logloss", "auc", "gauc"))]
        for name, found in card["references"].items()
    ]
    report = card["report"]
    reasons = [
        [table or "log", word, reason, f"{count:,}", "; ".join(found["examples"].get(reason, []))]
        for table, found in {"": report, **report["tables"]}.items()
        for word in ("dropped", "repaired")
        for reason, count in found[word].items()
    ]
    tables = [
        ("Sizes", ["", ""], sizes),
        ("Splits", ["part", "rows", "from", "to"], splits),
        ("Labels", ["label", "observed", *(f"rate, {part}" for part in card["splits"]), "entropy of test, nats",
                    "rate in tenths of the log, in time"], labels),
        ("Categorical fields", ["field", "side", "kind", "table rows", "coverage", "unknown, valid", "unknown, test",
                                "commonest value"], ids),
        ("Numbers", ["field", "side", "width", "raw: 0 1 25 50 75 99 100 %", "as models read them"], dense),
        ("Histories", ["history", "events", "length: 50 90 99 100 %", "empty", "age of the newest, s: 10 50 90 %",
                       "future events"], histories),
        (f"What single inputs say (AUC above {LEAK_AUC:g} is a leak until explained)",
         ["label", "input", "AUC, held out", ""], leaks),
        ("What a model has to beat (test, first label)", ["", "logloss", "AUC", "GAUC"], references),
        ("Rows that were not used as they stood", ["table", "", "reason", "rows", "examples"], reasons),
    ]  # fmt: skip
    return [table for table in tables if table[2]]


def card_page(card: dict[str, Any]) -> str:
    """The card as one HTML page."""
    return page_environment().get_template("card_page.html.j2").render(card=card, tables=card_tables(card))


def print_card(card: dict[str, Any]) -> None:
    """The card on the terminal."""
    from rich.console import Console
    from rich.table import Table as Shown

    console = Console()
    for title, columns, rows in card_tables(card):
        shown = Shown(title=title, title_justify="left", box=None, show_header=any(columns), padding=(0, 2, 0, 0))
        for name in columns:
            shown.add_column(name, overflow="fold")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()
    console.print("What the log cannot support")
    for line in card["limits"]:
        console.print(f"  {line}")


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _listed(values: Iterable[float] | None) -> str:
    return "" if values is None else " ".join(f"{value:.3g}" for value in values)
