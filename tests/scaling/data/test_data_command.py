"""`recscale data`: the explicit download, through a stand-in for pip, and a copy the user has."""

import hashlib
import json
import subprocess

import pytest
from click.testing import CliRunner

from recscale.scaling.cli import cli
from recscale.scaling.data.data_command import data
from recscale.scaling.data.importing import download

WHEEL = b"not really a wheel"


class Pip:
    """Stands in for `subprocess.run`: writes `content` as the wheel, or fails like pip does."""

    def __init__(self, content=WHEEL, name=download.WHEEL, error=None):
        self.content, self.name, self.error, self.commands = content, name, error, []

    def __call__(self, command, **kwargs):
        self.commands.append(command)
        if isinstance(self.error, Exception):
            raise self.error
        if self.error is None:
            with open(f"{command[command.index('-d') + 1]}/{self.name}", "wb") as file:
                file.write(self.content)
        return subprocess.CompletedProcess(command, 0 if self.error is None else 1, "", self.error or "")


@pytest.fixture
def pip(monkeypatch):
    def install(**kwargs):
        stand_in = Pip(**kwargs)
        monkeypatch.setattr(subprocess, "run", stand_in)
        monkeypatch.setattr(download, "SHA256", hashlib.sha256(WHEEL).hexdigest())
        return stand_in

    return install


def test_download_goes_through_this_interpreters_pip_once(pip, tmp_path):
    stand_in = pip()
    path = download.download_movielens_100k(tmp_path / "out")
    assert path.read_bytes() == WHEEL and path.name == download.WHEEL
    (command,) = stand_in.commands
    assert command[1:5] == ["-m", "pip", "download", "--no-deps"] and "recbole==1.2.1" in command
    assert not any("http" in word or "index" in word for word in command), "which index is the machine's business"
    assert download.download_movielens_100k(tmp_path / "out") == path
    assert len(stand_in.commands) == 1, "a verified file is kept"
    assert [p.name for p in (tmp_path / "out").iterdir()] == [download.WHEEL]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(content=b"something else"), "has sha256"),
        (dict(name="other.whl"), "pip fetched other.whl, expected"),
        (dict(error="noise\nERROR: No matching distribution found"), "ERROR: No matching distribution found"),
        (dict(error="No module named pip"), "No module named pip"),
        (dict(error=subprocess.TimeoutExpired("pip", 600)), "did not finish"),
        (dict(error=FileNotFoundError("python")), "did not finish"),
    ],
)
def test_failures_say_what_to_get_by_hand(pip, tmp_path, arguments, text):
    pip(**arguments)
    with pytest.raises(download.DownloadError) as error:
        download.download_movielens_100k(tmp_path)
    for part in (text, "By hand", "2.1 MB", "ml-100k.zip (4.9 MB)", "Licence", "--source"):
        assert part in str(error.value)
    assert list(tmp_path.iterdir()) == [], "nothing unverified stays"


def test_a_wrong_file_already_there_is_not_used(pip, tmp_path):
    stand_in = pip()
    (tmp_path / download.WHEEL).write_bytes(b"tampered")
    with pytest.raises(download.DownloadError, match="delete it"):
        download.download_movielens_100k(tmp_path)
    assert not stand_in.commands


@pytest.mark.parametrize("kind", ["write_recbole", "write_grouplens"])
def test_a_copy_at_hand_is_converted(request, tmp_path, kind):
    source = request.getfixturevalue(kind)(tmp_path / "mine")
    arguments = ["movielens-100k", "--out", str(tmp_path / "out"), "--source", str(source)]
    arguments += ["--max-dropped", "0.2", "--allow-modified", "--json"]
    done = CliRunner().invoke(data, arguments)
    assert done.exit_code == 0, done.output
    assert "GroupLens research licence" in done.output and "Harper" in done.output
    assert "dropped 1: unparsable" in done.output and "warning" in done.output
    result = json.loads(done.output.splitlines()[-1])
    assert result["splits"] == {"train": 35, "valid": 4, "test": 4}
    assert result["report"]["rows_kept"] == 43 and result["name"] == "movielens-100k"
    for file in source.iterdir():
        assert (tmp_path / "out.files" / file.name).read_bytes() == file.read_bytes()
    again = CliRunner().invoke(data, arguments)
    assert again.exit_code == 0 and json.loads(again.output.splitlines()[-1]) == result
    if kind == "write_recbole":  # a modified set is swept like the published one
        words = ["plan", "movielens", "--data", str(tmp_path / "out"), "--out", str(tmp_path / "sweep")]
        assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0


def test_errors_end_without_a_traceback(write_recbole, tmp_path):
    source = write_recbole(tmp_path / "mine")
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(data, ["movielens-100k", *out, "--source", str(source)])
    assert done.exit_code == 1 and "Error: movielens-100k: ml-100k.inter" in done.output
    assert "is not the published file" in done.output
    done = CliRunner().invoke(data, ["movielens-100k", *out, "--source", str(source), "--allow-modified"])
    assert done.exit_code == 1 and "7 of 50 rows were rejected (14.00%)" in done.output
    done = CliRunner().invoke(data, ["movielens-10k", *out])
    assert done.exit_code == 2 and "No such command 'movielens-10k'" in done.output
