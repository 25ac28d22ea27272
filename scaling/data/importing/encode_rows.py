"""Rows of another file in the terms of a log that was imported before: its ids, its numbers, its users' histories."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from recscale.scaling.data.stored_log.card import ReadReport
from recscale.scaling.data.stored_log.packed import PackedLog, write_meta

from . import reading
from .clean import Cleaner
from .columns import DenseRule
from .encode import bag_tables, read_tables
from .importer import DEFAULT_MEMORY, SCHEMA_FILE, list_columns
from .log_schema import SplitSpec, read_log_schema
from .pack import Packer
from .rows import make_rows, read_cleaned


def encode_rows(log: PackedLog, file: Path, work: Path) -> tuple[PackedLog, ReadReport]:
    """A packed log in `work` of the usable rows of a file, all of them in the test part, without labels.

    Histories end strictly before the row's time, in the events of `log`; a user it does not know has none.

    Raises:
        FileNotFoundError, ValueError: the log has no schema file, or the file lacks a column.
    """
    schema = read_log_schema(log.folder / SCHEMA_FILE)
    schema = dataclasses.replace(
        schema,
        log=dataclasses.replace(schema.log, files=(file.name,), format="auto"),
        where=None,
        unique=(),
        split=SplitSpec(by="random", train=0.0, valid=0.0, test=1.0),
        negatives=None,
    )
    facts = log.meta["facts"]
    cleaned, building, columns = work / "rows.parquet", work / "packed", work / "columns"
    for folder in (building, columns):
        folder.mkdir(parents=True)
    connection = reading.connect(DEFAULT_MEMORY, work / "spill")
    try:
        cleaner = Cleaner(schema, connection, file.parent, labelled=False)
        cleaner.write(0, cleaned, None)
        report = read_cleaned(connection, schema, [cleaned], [file.name])
        make_rows(connection, schema, [file.name], columns, log.ticks_per_second)
        tables = read_tables(connection, schema, log.folder, facts["tables"])
        bags = bag_tables(connection, list_columns(schema, tables), columns)
        rules = {
            name: DenseRule(**{key: value for key, value in rule.items() if key != "quantiles"})
            for name, rule in facts["dense"].items()
        }
        packed = Packer(connection, schema, tables, bags, building, columns, rules=rules, known=log).write()
    finally:
        connection.close()
    write_meta(
        building,
        name=log.name,
        schema=log.schema,
        splits=packed.splits,
        ticks_per_second=log.ticks_per_second,
        report=report,
        facts={},
    )
    return PackedLog(building), report
