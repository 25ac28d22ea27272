"""What the columns of a run table hold: declared for those of this package, found out for all others.

A file of text says nothing about types, and guessing merges the ids `0` and `00`, makes `NA` a missing data set and
turns a column called `updated_at` into dates. Here a column of ours has a declared type, and any other stays text
unless every value of it is a number, or every value is true or false.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

TEXT = (
    "run_id", "sweep", "architecture", "shape_id", "trunk_id", "group_id", "match_id", "arm", "status", "reasons",
    "dataset", "preset", "preset_changes", "table_start", "gauc_weighting", "lr_rule", "optimizer", "schedule",
    "negative_sampling", "device", "protocol",
)  # fmt: skip
FLAGS = ("decayed", "lr_bracketed")
NUMBERS = (
    "seed", "data_seed", "dense_params", "active_params", "embedding_params", "head_params", "tokenizer_params",
    "encoder_params", "position_params", "backbone_params", "memory_params", "memory_slots", "history_length",
    "active_fraction", "expert_granularity", "saturated_experts", "train_flops", "train_flops_per_row",
    "forward_flops_per_row", "flops_target", "params_target", "examples", "unique_examples", "epochs", "base_rate",
    "hash_collision_share", "lr_first_trials",
    "lr_dense", "lr_embedding", "lr_trials", "batch_rows", "warmup_examples", "logloss", "ne", "auc", "gauc",
    "calibration", "metric_window_rows", "metric_se", "excess_logloss", "entropy_floor", "asymptote", "wall_s",
    "step_ms", "rows_per_s", "mfu", "input_wait_share", "examples_seen", "replicas", "device_hours", "peak_host_bytes",
    "peak_device_bytes", "activation_bytes", "communication_bytes", "energy_kwh", "co2e_kg", "cost_usd",
)  # fmt: skip

_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
# Words for a missing number. In a column of texts they are texts.
_MISSING = ("na", "nan", "n/a", "null", "none", "-")
# How numbers are also written: the pattern, what it is called, and the option of `pandas.read_csv` that reads it.
_GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}([,' _\u00a0\u202f]\d{3})+(\.\d+)?")
_COMMA = re.compile(r"[+-]?\d+,\d+([eE][+-]?\d+)?")
_NOTATIONS = ((_GROUPED, "thousands separators", "thousands"), (_COMMA, "decimal commas", "decimal"))


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every column of texts as what it holds; columns that have a type already keep it.

    Raises ValueError where `numbers` does, for columns that are declared to hold numbers.
    """
    converted = {}
    for name in table.columns:
        values = table[name]
        if _is_text(values):
            texts = values.astype(object).where(values.notna() & (values.astype(str).str.strip() != ""), None)
            converted[name] = _column(str(name), texts).infer_objects()
    return table.assign(**converted)


def numbers(name: str, values: pd.Series) -> np.ndarray:
    """The values of a column that must hold numbers, float64 [n]; what is no number is NaN.

    Raises ValueError for numbers with thousands separators or decimal commas, naming the column and what to do.
    """
    if _is_text(values):
        written = [text.strip() for text in values.dropna()]
        for pattern, what, option in _NOTATIONS:
            found = [text for text in written if pattern.fullmatch(text)]
            if found and all(_NUMBER.fullmatch(text) or pattern.fullmatch(text) for text in written):
                mark = "," if option == "decimal" else next(c for c in found[0] if not c.isdigit() and c not in "+-")
                raise ValueError(
                    f"column {name!r} holds numbers with {what} ({found[0]!r}); write them plainly, for example with "
                    f"pandas.read_csv(FILE, sep=None, engine='python', {option}={mark!r}).to_csv(FILE, index=False)"
                )
    return pd.to_numeric(values, errors="coerce").to_numpy(float)


def _is_text(values: pd.Series) -> bool:
    return pd.api.types.infer_dtype(values, skipna=True) == "string"


def _column(name: str, texts: pd.Series) -> pd.Series:
    """Texts with None for empty ones as texts, flags or numbers."""
    if name in TEXT:
        return texts
    plain = texts.map(lambda text: text.strip(), na_action="ignore")
    words = plain.str.lower()
    if name not in NUMBERS:
        yes, no = (_TRUE, _FALSE) if name in FLAGS else (_TRUE[:1], _FALSE[:1])
        if words.notna().any() and words.dropna().isin([*yes, *no]).all():
            return words.isin(yes).astype(object).where(words.notna(), None)
    present = plain[plain.notna() & ~words.isin(_MISSING)]
    if len(present) and present.map(lambda text: _NUMBER.fullmatch(str(text)) is not None).all():
        return pd.to_numeric(present.reindex(texts.index))
    if name in NUMBERS:
        numbers(name, present)
    return texts
