"""`recscale`: lazy commands, nearest names, errors on one line."""

import importlib.metadata
import os
import subprocess
import sys

import click
import pytest

from recscale.scaling import cli

COMMANDS = importlib.metadata.entry_points(group=cli.GROUP)


def _main(capsys, *args):
    """(exit code, standard output, standard error)."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(args))
    captured = capsys.readouterr()
    return stopped.value.code, captured.out, captured.err


@pytest.fixture
def command(monkeypatch):
    """Registers a function as the command `probe`."""

    def register(function):
        class Entry:
            name, value = "probe", "elsewhere.commands:probe"

            def load(self):
                return click.command(name="probe")(function)

        monkeypatch.setattr(cli, "_entry_points", lambda: {"probe": Entry()})

    return register


def _raise_as_if_in(module, error):
    """Raises an error from a frame of the given module."""
    exec("raise error", {"__name__": module, "error": error})


def test_help_lists_every_command_without_importing_any():
    code = (
        "import sys\n"
        "from recscale.scaling import cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "slow = {'jax', 'flax', 'numpy', 'pandas', 'scipy', 'rich', 'torch', 'recscale.models'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for entry in COMMANDS:
        assert entry.name in done.stdout


def test_help_texts_belong_to_commands():
    assert {entry.name for entry in COMMANDS if entry.value.startswith("recscale.")} == set(cli.HELP)


def test_version(capsys):
    code, out, _ = _main(capsys, "--version")
    assert code == 0 and out.strip() == f"recscale {importlib.metadata.version('recscale')}"


def test_unknown_command_names_the_nearest(capsys):
    code, _, err = _main(capsys, "szie")
    assert code == 2 and "'szie'" in err and "did you mean 'size'?" in err


def test_of_many_names_the_three_nearest_are_printed(capsys):
    code, _, err = _main(capsys, "evaluat")
    assert code == 2 and "did you mean 'evaluate'? Also near: " in err
    assert len(err.split("Also near: ")[1].split(", ")) == 2 and "Known" not in err


def test_a_command_runs_with_its_arguments(capsys):
    code, out, _ = _main(capsys, "size", "rankmixer", "--dense-params", "1e5")
    assert code == 0 and "1e+05" in out


def test_commands_of_other_distributions_are_listed(command, capsys):
    command(lambda: None)
    code, out, _ = _main(capsys, "--help")
    assert code == 0 and "From elsewhere.commands:probe." in out


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("width is 3,\nexpected 4"), "Error: width is 3, expected 4"),
        (FileNotFoundError("there is no table runs.csv"), "Error: there is no table runs.csv"),
        (BlockingIOError("the plan is held by another process"), "Error: the plan is held by another process"),
        (KeyError("unknown data set 'x'; did you mean 'y'?"), "Error: unknown data set 'x'; did you mean 'y'?"),
    ],
)
def test_our_errors_are_one_line(command, capsys, error, line):
    command(lambda: _raise_as_if_in("recscale.scaling.somewhere", error))
    code, out, err = _main(capsys, "probe")
    assert (code, out, err) == (1, "", line + "\n")


def test_click_errors_keep_their_form(command, capsys):
    def fails():
        raise click.ClickException("no such folder")

    command(fails)
    assert _main(capsys, "probe") == (1, "", "Error: no such folder\n")


def test_errors_of_the_system_name_their_file(command, capsys, tmp_path):
    command(lambda: tmp_path.write_text(""))
    assert _main(capsys, "probe") == (1, "", f"Error: {tmp_path}: Is a directory\n")


@pytest.mark.parametrize(
    "module, error",
    [
        ("numpy.linalg", ValueError("operands could not be broadcast")),
        ("socket", ConnectionResetError("by peer")),
        ("recscale.scaling.somewhere", KeyError("width")),
        ("recscale.scaling.somewhere", TypeError("a bug of ours")),
    ],
)
def test_other_errors_keep_their_trace(command, module, error):
    command(lambda: _raise_as_if_in(module, error))
    with pytest.raises(type(error)):
        cli.main(["probe"])


@pytest.mark.parametrize("args", [["--traceback", "probe"], ["probe", "--traceback"]])
def test_traceback_anywhere_shows_the_whole_trace(command, args):
    command(lambda: _raise_as_if_in("recscale.scaling.somewhere", ValueError("told")))
    with pytest.raises(ValueError, match="told"):
        cli.main(args)


def test_a_backend_of_another_environment_does_not_stop_drawing(command, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "of_a_kernel_elsewhere")
    command(lambda: click.echo(os.environ["MPLBACKEND"]))
    assert _main(capsys, "probe")[:2] == (0, "agg\n")


def test_interruption_ends_with_130(command, capsys):
    def interrupted():
        raise KeyboardInterrupt

    command(interrupted)
    assert _main(capsys, "probe")[0] == 130


def test_a_command_may_choose_its_exit_code(command, capsys):
    command(lambda: click.get_current_context().exit(3))
    assert _main(capsys, "probe")[0] == 3
