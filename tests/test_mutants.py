"""The mutation job: what it changes, and which tests it tries on a change."""

import ast
import importlib.util
from collections import defaultdict
from pathlib import Path

import pytest

SOURCE = '''"""Sum 1 + 1."""

LIMIT = 5


def f(x: float = 2.0, y: int = 3) -> float:
    """Docs < and +."""
    if x < LIMIT and not y:
        raise ValueError(f"x < {x + 1}")
    note(zip(x, strict=True))
    return total(x, axis=0).sum() if y else -x * 2
'''


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_faults_are_small_changes_of_what_runs(mutants):
    found = mutants.faults(SOURCE)
    data = SOURCE.encode()
    changes = {(line, data[start:stop].decode(), text) for line, start, stop, text in found}
    assert changes == {
        (3, "5", "6"),
        (6, "2.0", "4.0"),
        (6, "3", "4"),
        (8, "x < LIMIT and not y", "(x < LIMIT or not y)"),
        (8, "x < LIMIT", "(x <= LIMIT)"),
        (8, "not y", "(y)"),
        (10, "note(zip(x, strict=True))", "pass"),
        (11, "total(x, axis=0).sum() if y else -x * 2", "(-x * 2 if y else total(x, axis=0).sum())"),
        (11, "total(x, axis=0).sum()", "total(x, axis=0).mean()"),
        (11, "total(x, axis=0)", "total(x)"),
        (11, "0", "1"),
        (11, "-x * 2", "(-x / 2)"),
        (11, "-x", "(x)"),
        (11, "2", "3"),
    }
    for _, start, stop, text in found:
        ast.parse(data[:start] + text.encode() + data[stop:])


def test_tests_that_execute_a_line_come_first_and_those_beside_them_after(mutants):
    near, far = "tests/models/test_a.py", "tests/scaling/test_b.py"
    seconds = {f"{near}::one": 5.0, f"{near}::two": 1.0, f"{far}::three": 0.1, "tests/test_c.py::four": 0.1}
    executed = defaultdict(lambda: defaultdict(set))
    executed["models/a.py"][7] = {f"{near}::two", f"{far}::three"}
    assert mutants.tests_of("models/a.py", 7, executed, seconds) == [f"{near}::two", f"{near}::one", f"{far}::three"]
    # A line that runs on import: whoever executes any of the module.
    assert len(mutants.tests_of("models/a.py", 1, executed, seconds)) == 3
    assert mutants.tests_of("models/other.py", 1, executed, seconds) == []


def test_the_nearest_tests_are_those_of_the_folder_and_of_what_is_built_of_a_module(mutants, monkeypatch):
    monkeypatch.setattr(mutants, "TREE", mutants.ROOT)
    own, above = mutants.nearest("models/mixers/tokenmixer_block.py")
    assert own[0] == "tests/models/mixers/test_tokenmixer_large.py" and "tests/models/test_architectures.py" in above
    names = above[-1].split(" or ")
    assert {"tokenmixer_block", "tokenmixer_large", "ug_tokenmixer_large"} <= set(names) and "msn" not in names
    assert {"pkm", "memory_plus", "msn"} <= set(mutants.built_of("models/memories/product_key_memory.py"))
    own, laws, _ = mutants.nearest("scaling/laws/fitting/fit.py")
    assert "tests/scaling/laws/fitting/test_fit_solver.py" in own
    assert "tests/scaling/laws/planning/test_design.py" in laws and not set(own) & set(laws)
    kernels = mutants.nearest("pallas_kernels/sparse_gather/xla.py")[0]
    assert kernels[0].startswith("tests/pallas_kernels/test_sparse_g") and len(kernels) < 10
    own, _ = mutants.nearest("sweeps/engine/design_command.py")
    assert own[:2] == ["tests/sweeps/engine/test_design_command.py", "tests/scaling/laws/planning/test_design.py"]


def test_tests_end_by_their_processor_time_or_long_after_it(mutants, monkeypatch, tmp_path):
    monkeypatch.setattr(mutants, "TREE", tmp_path)
    monkeypatch.setattr(mutants, "WORK", tmp_path)
    (tmp_path / "test_spins.py").write_text("def test_it():\n    while True:\n        pass\n")
    status, output, seconds = mutants._pytest("-v", "test_spins.py", seconds=1.0)
    assert status is None and 0.5 < seconds < 3
    (tmp_path / "test_fails.py").write_text("def test_it():\n    assert False\n")
    status, output, seconds = mutants._pytest("-v", "test_fails.py", seconds=60.0)
    assert status == 1 and "FAILED test_fails.py::test_it" in output and seconds > 0


def test_the_table_counts_what_was_noticed(mutants):
    done = [
        dict(folder="models", by="FAILED x", timed_out=None),
        dict(folder="models", by=None, timed_out="x"),
        dict(folder="pallas_kernels", by="x", timed_out=None),
    ]
    lines = mutants.table(done).splitlines()
    assert lines[2:] == [
        "| models | 2 | 1 (50%) | 1 |",
        "| pallas_kernels | 1 | 1 (100%) | 0 |",
        "| all | 3 | 2 (67%) | 1 |",
    ]
