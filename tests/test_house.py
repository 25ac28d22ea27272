"""How the folders hang together: imports, first lines, lengths, one home for every fact, and what a wheel holds."""

import ast
import functools
import re
import runpy
import subprocess
import sys
import types
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pallas_kernels", "models", "scaling", "sweeps")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


@functools.cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path):
    """[(line, module below `recscale`, imported name or "", dots)] of every import of this project in a file.

    Those inside functions and those for type checkers alone count like any other.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names = [(alias.name, "", 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["recscale", *package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [(module, alias.name, node.level) for alias in node.names]
        else:
            continue
        for module, name, dots in names:
            if module.split(".")[0] == "recscale":
                below = module.partition(".")[2]
                inner = f"{below}.{name}".strip(".")
                found.append((node.lineno, *((inner, "") if inner in MODULES else (below, name)), dots))
    return found


def where(path, line):
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    upward = [
        f"{where(path, line)} imports {module}"
        for path in FILES
        if path.is_relative_to(ROOT / folder)
        for line, module, _, _ in imports(path)
        if module.split(".")[0] not in allowed
    ]
    assert not upward
    assert any(imports(path) for path in FILES if path.is_relative_to(ROOT / folder))  # the check sees imports


def test_no_imports_go_round_in_a_circle():
    graph = {name: {module for _, module, _, _ in imports(path) if module in MODULES} for name, path in MODULES.items()}
    for name in graph:
        # A package's __init__ stands for what it re-exports, so what it holds may name it no more than itself.
        graph[name] -= {name}
    order, state = [], {}

    def visit(name, trail):
        if state.get(name) == "done":
            return
        assert state.get(name) != "open", " -> ".join([*trail[trail.index(name) :], name])
        state[name] = "open"
        for other in sorted(graph[name]):
            visit(other, [*trail, name])
        state[name] = "done"
        order.append(name)

    for name in sorted(graph):
        visit(name, [])
    assert len(order) == len(MODULES) > 200


def test_neighbours_have_one_dot_and_all_else_is_absolute():
    assert not [where(path, line) for path in FILES for line, _, _, dots in imports(path) if dots > 1]


def test_private_names_stay_in_their_module():
    taken = [
        f"{where(path, line)} takes {module}.{name}"
        for path in FILES
        for line, module, name, _ in imports(path)
        if name.startswith("_") and not name.startswith("__")
    ]
    for path in FILES:
        bound = {alias.asname or alias.name for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)
                 and (node.level or (node.module or "").startswith("recscale")) for alias in node.names}  # fmt: skip
        taken += [
            f"{where(path, node.lineno)} takes {node.value.id}.{node.attr}"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in bound
            and re.match(r"_[a-z]", node.attr)
            and not node.value.id[0].isupper()
        ]
    assert not taken


def test_every_file_says_what_it_is():
    silent, odd = [], []
    for path in FILES:
        text = ast.get_docstring(parsed(path))
        if not text:
            silent.append(module_name(path))
        elif re.search(r"\b(rooms?|doors?|house)\b", text.splitlines()[0]):
            odd.append(f"{module_name(path)}: {text.splitlines()[0]}")
    assert not silent and not odd


def test_no_file_is_too_long_to_read():
    lengths = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not {name: lines for name, lines in lengths.items() if lines > 500}


def test_whole_files_are_replaced_in_one_place():
    """A file that must never be seen half written is written by `records/files.py`."""
    writers = {
        module_name(path)
        for path in FILES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename", "tempfile.mkstemp")
    }
    # A converted log is a folder, published whole.
    assert writers == {"scaling.records.files", "scaling.data.stored_log.packed"}


# What had several homes once: a pattern of the names, and how many definitions there may be.
ONE_HOME = [
    r"nearest|_nearest|_?closest",
    r"_?(binary_|base_rate_)?entropy",
    r"normali[sz]ed_entropy",
    r"Tile",
    r"LOSSES|HIGHER_IS_BETTER|TARGET_WORDS|RUN_COLUMNS|_ALIASES",
    r"_?git_commit|_?commit",
]


@pytest.mark.parametrize("pattern", ONE_HOME)
def test_a_fact_has_one_home(pattern):
    homes = defaultdict(set)
    for path in FILES:
        for node in parsed(path).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            for name in names:
                if re.fullmatch(pattern, name):
                    homes[name.lstrip("_")].add(module_name(path))
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_nearest_names_come_from_one_function():
    callers = {module_name(path) for path in FILES if "difflib" in path.read_text(encoding="utf-8")}
    assert callers == {"pallas_kernels.names"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_never_loaded_a_second_time(folder):
    done = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and f"{folder}/ is the package recscale.{folder}" in done.stderr.splitlines()[-1]


def test_tests_stand_where_what_they_test_does():
    places = {path.relative_to(ROOT / "tests").parent for path in TESTS if path.name.startswith("test_")}
    assert not [str(place) for place in places if place.parts[:1] != ("notebooks",) and not (ROOT / place).is_dir()]
    assert not [
        name for name, count in Counter(path.name for path in TESTS if path.name[:5] == "test_").items() if count > 1
    ]


def test_few_findings_of_the_type_checker_are_waved_through():
    ignored = [
        line.strip() for path in FILES for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"#\s*(type|pyright):\s*(ignore|basic|strict|report)", line)
    ]  # fmt: skip
    assert len(ignored) <= 25
    assert not [
        line for line in ignored if not re.search(r"pyright: ignore\[\w+\]\s+# \w", line)
    ]  # a rule and a reason


def test_models_read_flags_by_name():
    """A flag that is renamed is found by one search: none is read through a list of names or handed on in a heap."""
    found = []
    for path in FILES:
        # Option groups are checked, frozen and taken out of configs in general there.
        if not path.is_relative_to(ROOT / "models") or path == ROOT / "models" / "options.py":
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and len(node.args) > 1:
                read = ast.unparse(node.args[0]) in ("config", "options", "self.config", "self.options")
                if read and not isinstance(node.args[1], ast.Constant):
                    found.append(where(path, node.lineno))
            if isinstance(node, ast.FunctionDef) and re.match("__init__$|build|make", node.name) and node.args.kwarg:
                found.append(where(path, node.lineno))
    assert not found


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
    assert packaging["package_dir"] == {f"recscale.{folder}": folder for folder in FOLDERS}


def test_a_wheel_holds_every_data_file(packaging):
    data = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
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
        name, module, function = re.fullmatch(r"([\w-]+) = recscale\.([\w.]+):(\w+)", line).groups()
        tree = parsed((ROOT / module.replace(".", "/")).with_suffix(".py"))
        assert function == name.replace("-", "_") and function in {getattr(node, "name", None) for node in tree.body}


BASE_IMPORTS = {"jax", "flax", "jaxtyping", "lazy_loader", "ml_collections", "numpy", "click"}


@pytest.mark.parametrize("folder", ["pallas_kernels", "models"])
def test_modules_need_only_the_base(packaging, folder):
    required = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in packaging["install_requires"]}
    assert required == BASE_IMPORTS
    outside = set()
    for path in FILES:
        if path.is_relative_to(ROOT / folder):
            for node in ast.walk(parsed(path)):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                outside |= {name.split(".")[0] for name in names}
    assert outside - set(sys.stdlib_module_names) <= BASE_IMPORTS | {"recscale"}


def test_optional_dependencies_are_used(packaging):
    """An extra that no file imports would install something for nothing."""
    code = "".join(path.read_text(encoding="utf-8") for path in FILES)
    extras = packaging["extras_require"]
    tools = {"dev", "tests", "notebooks", "tpu", "cuda"}  # not imported here: tests and notebooks use them, or jax does
    for extra in extras.keys() - tools:
        for requirement in set(extras[extra]) - set(extras["lab"]) if extra != "lab" else extras["lab"]:
            module = re.match(r"\w+", requirement)[0]
            module = {"pyyaml": "yaml"}.get(module, module)
            # pandas reads and writes Parquet through pyarrow, jax exported programs through flatbuffers.
            assert module in ("pyarrow", "flatbuffers") or re.search(
                rf"^\s*(import|from) {module}\b", code, re.MULTILINE
            ), (
                extra,
                module,
            )


def test_annotations_of_arrays_are_checked_as_tests_call_them():
    import jax.numpy as jnp
    import jaxtyping

    from recscale.models import mix

    assert mix(jnp.ones((3, 2, 4)), 2).shape == (3, 2, 4)
    with pytest.raises(jaxtyping.TypeCheckError):
        mix(jnp.ones((3, 2, 4), int), 2)
