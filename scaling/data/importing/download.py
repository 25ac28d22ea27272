"""The explicit download of MovieLens-100K: a wheel that carries it, fetched through pip, verified by its sha256.

Nothing else in the project ever downloads. pip asks whichever package index this machine is set up for; the
wheel is kept as a file and never installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from recscale.scaling.records.files import replacing, write_atomically

from .movielens_files import NAME, find_tables

REQUIREMENT = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
TIMEOUT_S = 600
BY_HAND = (
    f"By hand: either put {WHEEL} (2.1 MB, sha256 {SHA256}, from a Python package index) into a folder, or "
    "download ml-100k.zip (4.9 MB) from grouplens.org (data sets, MovieLens 100K), and run `recscale data "
    "movielens-100k --out DIR --source PATH`. Licence of the data: GroupLens research terms (cite, no "
    "commercial use, no redistribution)."
)


class DownloadError(RuntimeError):
    """The file could not be fetched, or is not the expected one; the text says how to get it by hand."""


def download_movielens_100k(out: str | os.PathLike[str], *, timeout_s: float = TIMEOUT_S) -> Path:
    """Puts the verified wheel into `out` and returns its path; one already there is verified and kept.

    Raises:
        DownloadError: pip is absent, fails or takes too long, or the file's sha256 is not the expected one.
    """
    target = Path(out) / WHEEL
    if target.is_file():
        _check_sha256(target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download.", dir=target.parent) as folder:
        _pip_download(folder, timeout_s)
        fetched = Path(folder) / WHEEL
        if not fetched.is_file():
            found = ", ".join(sorted(path.name for path in Path(folder).iterdir())) or "nothing"
            raise DownloadError(f"pip fetched {found}, expected {WHEEL}. {BY_HAND}")
        _check_sha256(fetched)
        fetched.rename(target)  # checked, and of the same disk: whole or not there
    return target


def copy_source(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Copies a wheel, a zip or the set's files in a folder to `out`, unless they are there; returns their place.

    A folder's files keep their names. Nothing is verified here: loading does that.
    """
    source, out = Path(source), Path(out)
    tables = find_tables(source)
    out.mkdir(parents=True, exist_ok=True)
    if tables.origin.is_file():
        target = out / tables.origin.name
        if tables.origin.resolve() != target.resolve():
            with replacing(target) as temporary:
                shutil.copyfile(tables.origin, temporary)
        return target
    for file, content in tables.content():
        if (tables.origin / file.name).resolve() != (out / file.name).resolve():
            write_atomically(out / file.name, content)
    return out


def _pip_download(folder: str, timeout_s: float) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", REQUIREMENT, "-d", folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"{NAME}: `{' '.join(command[1:])}` did not finish: {error}. {BY_HAND}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        last = "\n".join([line for line in said if line.startswith("ERROR")] or said[-5:])
        raise DownloadError(f"{NAME}: `{' '.join(command[1:])}` failed ({done.returncode}):\n{last}\n{BY_HAND}")


def _check_sha256(path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise DownloadError(f"{path} has sha256 {found}, expected {SHA256}; delete it. {BY_HAND}")
