"""The rooms of the house: imports point one way, every file says what it is, and a wheel holds what it should."""

import ast
import functools
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pallas_kernels", "models", "scaling", "sweeps")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """[(line, dotted name below `recscale`)] of every import of this project in a file."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["recscale", *package[: len(package) - node.level + 1]] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [[*module, alias.name] for alias in node.names]
        found += [(node.lineno, name[1:]) for name in names if name[0] == "recscale"]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    allowed = ROOMS[: ROOMS.index(room) + 1]
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {'.'.join(name)}"
        for path in FILES
        if path.is_relative_to(ROOT / room)
        for line, name in imports(path)
        if name[0] not in allowed
    ]
    assert not upward
    assert any(imports(path) for path in FILES if path.is_relative_to(ROOT / room))  # the check sees imports


def test_every_file_says_what_it_is():
    silent = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(parsed(path))]
    assert not silent


def test_no_file_is_too_long_to_read():
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {path: lines for path, lines in long.items() if lines > 600}


@pytest.fixture
def packaging(monkeypatch):
    """What setup.py hands to setuptools, which need not be installed."""

    def find_packages(folder):
        return [
            ".".join(path.relative_to(folder).parts[:-1])
            for path in Path(folder).rglob("__init__.py")
            if path.parent != Path(folder)
        ]

    given = {}
    fake = types.SimpleNamespace(find_packages=find_packages, setup=lambda **options: given.update(options))
    monkeypatch.setitem(sys.modules, "setuptools", fake)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_a_wheel_holds_every_module_below_recscale(packaging):
    folders = {"recscale." + ".".join(path.relative_to(ROOT).parts[:-1]) for path in FILES}
    assert set(packaging["packages"]) == folders
    assert packaging["package_dir"] == {f"recscale.{room}": room for room in ROOMS}


def test_a_wheel_holds_every_data_file(packaging):
    data = {
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    packed = {
        path
        for package, patterns in packaging["package_data"].items()
        for pattern in patterns
        for path in (ROOT / package.removeprefix("recscale.")).glob(pattern)
    }
    assert data and data <= packed


def test_commands_lead_to_functions(packaging):
    for line in packaging["entry_points"]["recscale.commands"]:
        name, module, function = re.fullmatch(r"(\w+) = recscale\.([\w.]+):(\w+)", line).groups()
        tree = parsed((ROOT / module.replace(".", "/")).with_suffix(".py"))
        assert function == name and function in {getattr(node, "name", None) for node in tree.body}


def test_optional_dependencies_are_used(packaging):
    """An extra that no file imports would install something for nothing."""
    code = "".join(path.read_text(encoding="utf-8") for path in FILES)
    extras = packaging["extras_require"]
    tools = {"dev", "notebooks", "tpu", "cuda"}  # not imported here: tests and notebooks use them, or jax does
    for extra in extras.keys() - tools:
        for requirement in set(extras[extra]) - set(extras["lab"]) if extra != "lab" else extras["lab"]:
            module = re.match(r"\w+", requirement)[0]
            # pandas reads and writes Parquet through pyarrow.
            assert module == "pyarrow" or re.search(rf"^\s*(import|from) {module}\b", code, re.MULTILINE), (
                extra,
                module,
            )
