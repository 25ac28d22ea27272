"""Schema files proposed from what data sets of other libraries say of themselves: RecBole's atomic files, whose headers
hold types, and FuxiCTR's `dataset_config.yaml`.

    .inter .user .item   columns name:token, name:token_seq (blanks between), name:float, name:float_seq
    .yaml                feature_cols, label_col and the files of every part of each data set
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import yaml

from .conditions import quoted, text

_KINDS = ("token", "token_seq", "float", "float_seq")
_SPLIT_BY_TIME = ["", "[split]", 'by = "time"', "train = 0.8", "valid = 0.1", "test = 0.1"]


def propose_recbole(inter: Path) -> str:
    """The text of a schema file for an atomic file `NAME.inter` with `NAME.user` and `NAME.item` where they lie beside.

    Raises:
        ValueError: a header without types, or none of a user or an item.
    """
    tables = {".inter": _typed_header(inter)}
    sides = {".user": "user", ".item": "candidate"}
    tables |= {
        ending: _typed_header(inter.with_suffix(ending)) for ending in sides if inter.with_suffix(ending).is_file()
    }
    columns = tables[".inter"]
    user, item = (next((c for c in columns if c.startswith(f"{name}:")), None) for name in ("user_id", "item_id"))
    if user is None or item is None:
        raise ValueError(f"{inter}: expected the columns user_id:token and item_id:token, found {', '.join(columns)}")
    clock = next((c for c in columns if c.split(":")[0] == "timestamp"), None)
    lines = [f"# Proposed from the typed headers of {inter.name}; read every line, then:"]
    lines += ["#     recscale data import FILE --out DIR", f"user = {json.dumps(user)}"]
    lines += [f'time = {{column = {json.dumps(clock)}, unit = "s"}}'] if clock else []
    lines += ["", "[log]", f"files = {json.dumps([inter.name])}", f"name = {json.dumps(inter.stem)}"]
    lines += ['format = "tsv"', 'quote = ""']
    for ending in tables:
        if ending in sides:
            lines += ["", f"[joins.{ending[1:]}s]", f"files = {json.dumps([inter.with_suffix(ending).name])}"]
            lines += ['format = "tsv"', 'quote = ""', f"on = {json.dumps(user if ending == '.user' else item)}"]
    label = next((c for c in columns if c.split(":")[0] in ("label", "rating")), None)
    lines += _recbole_label(inter, label, item)
    lines += _recbole_fields(inter, tables, {clock, label}, user)
    if clock:
        lines += ["", "[histories.history]  # the user's earlier rows", 'from = "log"', 'fields = ["item_id"]']
    if label is None:
        lines += ["", "[negatives]  # the log has no exposures", 'within = "item_id"', "per_positive = 4"]
    split = _SPLIT_BY_TIME if clock else [line.replace("time", "random") for line in _SPLIT_BY_TIME]
    return "\n".join([*lines, *split]) + "\n"


def _typed_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as file:
        columns = file.readline().rstrip("\n").split("\t")
    odd = [column for column in columns if column.rpartition(":")[2] not in _KINDS]
    if odd:
        raise ValueError(f"{path}: {odd[0]!r} has no type; expected name:{'|'.join(_KINDS)}, separated by tabs")
    return columns


def _recbole_label(inter: Path, label: str | None, item: str) -> list[str]:
    if label is None:
        return ["", "[labels.seen]  # every row is positive", f"column = {json.dumps(item)}", "positive = \"!= ''\""]
    scan = f"read_csv({text(inter)}, delim='\t', quote='', header=true, all_varchar=true, ignore_errors=true)"
    number = f"TRY_CAST({quoted(label)} AS DOUBLE)"
    figures = duckdb.execute(f"SELECT min({number}), max({number}), median({number}) FROM {scan}")
    least, most, middle = figures.fetchall()[0]
    lines = ["", f"[labels.{'label' if (least, most) == (0, 1) else 'like'}]", f"column = {json.dumps(label)}"]
    return lines if (least, most) == (0, 1) else [*lines, f'positive = ">= {middle:g}"  # values {least:g} to {most:g}']


def _recbole_fields(inter: Path, tables: dict[str, list[str]], used: set[str | None], user: str) -> list[str]:
    lines, known = [], set()
    for ending, columns in tables.items():
        for column in columns:
            name, _, kind = column.rpartition(":")
            if column in used or column in known:
                continue
            known.add(column)
            side = "user" if column == user or ending == ".user" else "candidate"
            lines += ["", f"[fields.{name}]", f"column = {json.dumps(column)}", f'side = "{side}"']
            if kind == "token":
                lines.append('kind = "id"')
            elif kind == "token_seq":
                lines += ['kind = "ids"', 'separator = " "']
            elif kind == "float":
                lines += ['kind = "dense"', 'transform = "standard"', 'missing = "indicator"']
            else:
                size = _first_length(inter.with_suffix(ending), columns.index(column))
                lines += ['kind = "vector"', 'separator = " "', f"size = {size}"]
    return lines


def _first_length(path: Path, place: int) -> int:
    with path.open(encoding="utf-8") as file:
        file.readline()
        return len(file.readline().rstrip("\n").split("\t")[place].split(" "))


def propose_fuxictr(config: Path) -> str:
    """The text of a schema file for a `dataset_config.yaml`; of several data sets the first. Files are those it names.

    Raises:
        ValueError: no data set with feature_cols and train_data.
    """
    sets = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    found = next((item for item in sets.items() if isinstance(item[1], dict) and "feature_cols" in item[1]), None)
    if found is None or "train_data" not in found[1]:
        raise ValueError(f"{config}: no data set with feature_cols and train_data")
    name, given = found
    parts = {part: Path(given[f"{part}_data"]).name for part in ("train", "valid", "test") if given.get(f"{part}_data")}
    features = [one for group in given["feature_cols"] if group.get("active", True) for one in _single(group)]
    lines = [f"# Proposed from {config.name}; read every line, then:", "#     recscale data import FILE --out DIR"]
    user = next((f["name"] for f in features if f["name"].lower() in ("user_id", "userid", "user")), None)
    lines += [f"user = {json.dumps(user)}"] if user else []
    lines += ["", "[log]", f"name = {json.dumps(name)}", f"files = {json.dumps(list(parts.values()))}"]
    for label in _single(given["label_col"]) if isinstance(given["label_col"], dict) else given["label_col"]:
        lines += ["", f"[labels.{label['name']}]", f"column = {json.dumps(label['name'])}"]
    listed = []
    for feature in features:
        if feature.get("type") == "meta":
            continue
        if feature.get("type") == "sequence" and feature.get("share_embedding"):
            listed.append(feature)
        else:
            lines += ["", *_fuxictr_field(feature, user, given.get("min_categr_count", 1))]
    for feature in listed:
        lines += ["", f"[histories.{feature['name']}]", f"column = {json.dumps(feature['name'])}"]
        lines += [f"fields = {json.dumps([feature['share_embedding']])}", *_separator(feature)]
        lines += [f"length = {feature.get('max_len', 50)}", 'order = "oldest first"  # check it']
    lines += ["", "[split]", 'by = "files"', "[split.parts]"]
    return "\n".join([*lines, *(f"{part} = {json.dumps([file])}" for part, file in parts.items())]) + "\n"


def _single(group: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry a name: FuxiCTR lets several columns share one."""
    names: Sequence[str] = [group["name"]] if isinstance(group["name"], str) else group["name"]
    return [group | {"name": name} for name in names]


def _fuxictr_field(feature: dict[str, Any], user: str | None, min_count: int) -> list[str]:
    side = "user" if feature["name"] == user or feature.get("source") == "user" else "candidate"
    guess = "" if "source" in feature or feature["name"] == user else "  # a guess: user, candidate or cross"
    lines = [f"[fields.{feature['name']}]", f'side = "{side}"{guess}']
    if feature.get("type") == "numeric":
        return [*lines, 'kind = "dense"', 'transform = "standard"', 'missing = "indicator"']
    if feature.get("type") == "sequence":
        return [*lines, 'kind = "ids"', *_separator(feature), f"max_length = {max(feature.get('max_len', 8), 2)}"]
    least = feature.get("min_categr_count", min_count)
    return [*lines, 'kind = "id"', *([f"min_count = {least}"] if least > 1 else [])]


def _separator(feature: dict[str, Any]) -> list[str]:
    return [f"separator = {json.dumps(feature.get('splitter', '^'))}"]
