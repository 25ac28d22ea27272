"""The explicit download of MovieLens-100K: a wheel that carries it, fetched through pip, verified by its sha256.

Nothing else in the project ever downloads. pip asks whichever package index this machine is set up for; the
wheel is kept as a file and never installed. Two formats hold the same data: the wheel's (`ml-100k.inter`, `.user`,
`.item`) and GroupLens' (`u.data`, `u.user`, `u.item`); each has a shipped schema.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from recscale.scaling.records.files import write_atomically

NAME = "movielens-100k"
# Format -> (shipped schema, file -> (bytes, md5)). The md5 of the .inter file is the publisher's reference; the others
# were computed from the wheel whose sha256 is checked, and from a GroupLens copy whose u.data equals the body of that
# .inter file.
FORMATS = {
    "recbole": (NAME, {
        "ml-100k.inter": (1_979_230, "a8a8c3f165aedc53f63b5dc0a0463b14"),
        "ml-100k.user": (22_697, "ac50ecbab626dbefa83288a3593f92ab"),
        "ml-100k.item": (66_632, "fb748e97e64d9a35421d06d7083d0959"),
    }),
    "grouplens": (f"{NAME}-grouplens", {
        "u.data": (1_979_173, "6e47046882bad158b0efbb84cd5cb987"),
        "u.user": (22_628, "1b53539edc13caad0282c8500608a319"),
        "u.item": (236_344, "c9e7f390115d79079537301d5204f3f7"),
    }),
}  # fmt: skip
_FOLDERS = ("", "ml-100k", "recbole/dataset_example/ml-100k")
_ARCHIVES = ("recbole-1.2.1*.whl", "ml-100k.zip")

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


def get_movielens_100k(out: Path, source: Path | None, *, allow_modified: bool = False) -> tuple[str, list[str]]:
    """Puts the set's three files into `out`, verified; returns the name of their schema and a warning per changed file.

    Args:
        source: a wheel, a zip, or a folder that holds either or the files; None downloads the wheel.
        allow_modified: accept files whose checksum is not the published one.

    Raises:
        DownloadError: see `download_movielens_100k`. FileNotFoundError, ValueError: a file is missing, an archive is
            not whole, or a checksum differs.
    """
    kind, files = _find(source if source is not None else download_movielens_100k(out))
    schema, published = FORMATS[kind]
    wrong = [
        f"{name} is not the published file: {len(content)} bytes, md5 {_md5(content)}; expected {published[name][0]} "
        f"bytes, md5 {published[name][1]}{' (truncated?)' if len(content) < published[name][0] else ''}"
        for name, content in files.items()
        if _md5(content) != published[name][1]
    ]
    if wrong and not allow_modified:
        raise ValueError(f"{NAME}: " + "\n".join(wrong) + f"\nUse --allow-modified to read it all the same. {BY_HAND}")
    for name, content in files.items():
        write_atomically(out / name, content)
    return schema, wrong


def _find(source: Path) -> tuple[str, dict[str, bytes]]:
    """Format and contents of the three files in an archive or a folder."""
    if source.is_file():
        try:
            with zipfile.ZipFile(source) as archive:
                names = {Path(name).name: name for name in archive.namelist()}
                return _take(source, lambda name: archive.read(names[name]) if name in names else None)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(
                f"{source} is not a whole zip or wheel ({error}); it may be truncated. {BY_HAND}"
            ) from error
    for folder in (source / name for name in _FOLDERS):
        if any((folder / name).is_file() for _, files in FORMATS.values() for name in files):
            return _take(folder, lambda name, at=folder: (at / name).read_bytes() if (at / name).is_file() else None)
    for pattern in _ARCHIVES:
        for archive in sorted(source.glob(pattern)):
            return _find(archive)
    raise FileNotFoundError(f"{NAME}: {source} holds neither the set's files nor {' or '.join(_ARCHIVES)}. {BY_HAND}")


def _take(origin: Path, read: Callable[[str], bytes | None]) -> tuple[str, dict[str, bytes]]:
    for kind, (_, published) in FORMATS.items():
        found = {name: content for name in published if (content := read(name)) is not None}
        lacking = ", ".join(name for name in published if name not in found)
        if found and lacking:
            raise FileNotFoundError(
                f"{NAME}: {lacking} is missing from {origin}, which holds others of the set. {BY_HAND}"
            )
        if found:
            return kind, found
    raise FileNotFoundError(f"{NAME}: {origin} holds neither ml-100k.inter nor u.data. {BY_HAND}")


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


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
