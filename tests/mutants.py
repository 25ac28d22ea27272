"""Which faults the fast tests notice: one-line faults, put one at a time into a copy of the last commit.

    make mutants ARGS="--number 120 --seed 1"

draws faults at random, an equal number in each folder, runs for each the tests that execute its line (the nearest and
cheapest first, up to the first that fails) and prints the share noticed per folder and the faults that survived.
What was tried is kept in build/mutants, so a run that was stopped goes on; ARGS="--table" prints what is there.

A fault counts as noticed when a test fails, cannot be collected, or takes ten times the processor time it should. One
whose tests take more than --limit seconds of processor time, or three times as long by the clock, timed out: the table
has a column of those, and they count as survivors. Measuring what tests execute takes half an hour; --nearest does
without, tries the tests that stand nearest to the line, and so finds too many survivors.
"""

import argparse
import ast
import contextlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutants"
TREE = WORK / "tree"

SOURCES = ("pallas_kernels", "models", "scaling", "sweeps")

# What faults are drawn from.
FOLDERS = {
    "models": ["models/**/*.py"],
    "scaling/laws": ["scaling/laws/**/*.py"],
    "scaling/training": ["scaling/training/**/*.py"],
    "sweeps/engine": ["sweeps/engine/**/*.py"],
    "pallas_kernels": [f"pallas_kernels/*/{name}.py" for name in ("api", "xla", "reference")],
}

OTHER_COMPARISON = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OTHER_OPERATOR = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_SWAPS = ("maximum minimum", "max min", "sum mean", "argmax argmin", "any all", "floor ceil", "zeros ones")
OTHER_CALL = {a: b for pair in map(str.split, _SWAPS) for a, b in (pair, pair[::-1])}
# Functions of one argument that are left out: f(x) -> x.
LEFT_OUT = {"stop_gradient", "sqrt", "abs", "log", "exp", "square", "sorted", "rsqrt", "softmax", "sigmoid", "tanh"}


def faults(source):
    """[(line, start, stop, replacement)]: every one-line fault of a module, as a slice of its bytes."""
    tree, starts = ast.parse(source), [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    found = []

    def replace(node, text):
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        found.append((node.lineno, begin, end, text))

    def visit(node):
        for text in _replacements(node):
            replace(node, text)
        for child in _children(node):
            visit(child)

    visit(tree)
    return found


def _children(node):
    """Parts of a node in which a change could be noticed: no annotations, messages or imports, nor zip's `strict`."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom) or _is_strict(node):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child


def _replacements(node):
    """Texts that make a fault of this node."""
    match node:
        case ast.Compare(left, [operator], [right]) if type(operator) in OTHER_COMPARISON:
            yield f"({ast.unparse(ast.Compare(left, [OTHER_COMPARISON[type(operator)]()], [right]))})"
        case ast.BinOp(left, operator, right) if type(operator) in OTHER_OPERATOR and not _is_text(left, right):
            yield f"({ast.unparse(ast.BinOp(left, OTHER_OPERATOR[type(operator)](), right))})"
        case ast.AugAssign(target, operator, value) if type(operator) in OTHER_OPERATOR:
            yield ast.unparse(ast.AugAssign(target, OTHER_OPERATOR[type(operator)](), value))
        case ast.BoolOp(operator, values):
            yield f"({ast.unparse(ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values))})"
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield f"({ast.unparse(operand)})"
        case ast.IfExp(test, body, orelse):
            yield f"({ast.unparse(ast.IfExp(test, orelse, body))})"
        case ast.Constant(bool() as value):
            yield repr(not value)
        case ast.Constant(int() as value):
            yield repr(value + 1)
        case ast.Constant(float() as value):
            yield repr(value * 2 if value else 1.0)
        case ast.Expr(ast.Call()):
            yield "pass"
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in OTHER_CALL:
            new = OTHER_CALL[name]
            changed = ast.Attribute(node.func.value, new) if isinstance(node.func, ast.Attribute) else ast.Name(new)
            yield ast.unparse(ast.Call(changed, node.args, node.keywords))
        if name in LEFT_OUT and len(node.args) == 1:
            yield f"({ast.unparse(node.args[0])})"
        for keyword in node.keywords:
            if keyword.arg and not _is_strict(keyword):
                yield ast.unparse(ast.Call(node.func, node.args, [k for k in node.keywords if k is not keyword]))


def _is_strict(node):
    """Whether a node is `strict=` of zip: it notices faults elsewhere, and where there is none it changes nothing."""
    return isinstance(node, ast.keyword) and node.arg == "strict"


def _is_text(*nodes):
    return any(isinstance(n, ast.JoinedStr) or isinstance(n, ast.Constant) and isinstance(n.value, str) for n in nodes)


def _environment():
    """Imports of `recscale` lead to the copy; compiled programs are kept between faults."""
    return os.environ | {
        "PYTHONPATH": str(TREE / ".paths"),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(WORK / "xla")),
    }


def _pytest(*arguments, seconds=None, **variables):
    """Exit status, output and seconds of processor time. Status None if one process needed more than `seconds` of that,
    or the clock went on by three times as many. Whatever it started ends with it.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *arguments]
    limit = None if seconds is None else (math.ceil(seconds),) * 2
    before, log = os.times(), WORK / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=TREE,
            env=_environment() | variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_CPU, limit)),
        )
        try:
            status = process.wait(timeout=limit and 3 * limit[0])
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    exceeded = limit is not None and status in (-signal.SIGXCPU, -signal.SIGKILL)
    return None if exceeded else status, log.read_text(errors="replace"), spent


def _commit(folder):
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()


def copy():
    """Makes the copy of the last commit, unless it is there."""
    if not TREE.exists() or _commit(TREE) != _commit(ROOT):
        for old in (TREE, WORK / "measured"):
            shutil.rmtree(old, ignore_errors=True)
        subprocess.run(["git", "clone", "-q", str(ROOT), str(TREE)], check=True)
    subprocess.run(["git", "checkout", "-q", "."], cwd=TREE, check=True)  # a run that was killed left its fault


def measure(workers, ends):
    """Measures what the tests of every folder execute, and goes on where it stopped.

    Returns ({file: {line: {test}}}, {test: seconds}) of the tests that pass, or None if `ends` came first.
    """
    measured = WORK / "measured"
    measured.mkdir(exist_ok=True)
    watched = [argument for folder in SOURCES for argument in ("--cov", str(TREE / folder))]
    options = ("--cov-context=test", "--cov-report=", "-n", str(workers), "--dist", "worksteal")
    for folder in sorted({path.parent for path in (TREE / "tests").rglob("test_*.py")}):
        stem = measured / ".".join(folder.relative_to(TREE).parts)
        if not Path(f"{stem}.xml").exists():
            if time.monotonic() > ends:
                return None
            files = sorted(map(str, folder.glob("test_*.py")))
            variables = dict(COVERAGE_FILE=f"{stem}.lines")
            _, output, _ = _pytest("-q", *watched, *options, f"--junitxml={stem}.part", *files, **variables)
            Path(f"{stem}.log").write_text(output)
            os.replace(f"{stem}.part", f"{stem}.xml")
            print(f"measured {stem.name}: {output.splitlines()[-1]}", flush=True)
    return _executed(measured), _seconds(measured)


def _seconds(measured):
    found = {}
    for path in measured.glob("*.xml"):
        for case in xml.parse(path).iter("testcase"):
            if not {child.tag for child in case} & {"failure", "error", "skipped"}:
                file = case.get("classname").replace(".", "/") + ".py"
                found[f"{file}::{case.get('name')}"] = float(case.get("time"))
    return found


def _executed(measured):
    from coverage import CoverageData  # comes with pytest-cov

    found = defaultdict(lambda: defaultdict(set))
    for path in measured.glob("*.lines"):
        data = CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            name = str(Path(file).resolve().relative_to(TREE.resolve()))
            for line, contexts in data.contexts_by_lineno(file).items():
                found[name][line] |= {context.rpartition("|")[0] for context in contexts} - {""}
    return found


def tests_of(path, line, executed, seconds):
    """Tests that could notice a fault of a line: those that execute it, then others of their files, whose fixtures may
    have executed it for them; files in the order of how near they stand and how long they take.

    Of a line that runs on import alone these are the tests that execute any of the module.
    """
    lines = executed[path]
    direct = lines[line] or set().union(*lines.values())
    files = defaultdict(list)
    for test in seconds:
        files[test.partition("::")[0]].append(test)
    reached = {test.partition("::")[0] for test in direct}
    near = f"tests/{Path(path).parent}"
    cost = {file: sum(seconds[test] for test in files[file]) for file in reached}
    name = f"test_{Path(path).stem}"
    order = sorted(reached, key=lambda f: (Path(f).stem != name, str(Path(f).parent) != near, cost[f]))
    return [test for file in order for test in sorted(files[file], key=lambda test: test not in direct)]


def draw(number, seed):
    """Faults, equally many per folder: [{folder, path, line, start, stop, text}]."""
    drawn = []
    for folder, patterns in FOLDERS.items():
        paths = sorted({path for pattern in patterns for path in TREE.glob(pattern)})
        every = [(str(path.relative_to(TREE)), *fault) for path in paths for fault in faults(path.read_text())]
        for path, line, start, stop, text in random.Random(f"{seed} {folder}").sample(every, number // len(FOLDERS)):
            drawn.append(dict(folder=folder, path=path, line=line, start=start, stop=stop, text=text))
    random.Random(seed).shuffle(drawn)
    return drawn


def nearest(path):
    """[arguments of pytest]: tests by how near they stand to a module, without knowing what they execute. First those
    of its folder and those that import it, wherever they are: of its name first, then by import and by mention. Then
    those of the folders above, of models only for what is built of the module. Of a kernel's, only those that name its
    operation or one that uses it.
    """
    texts = {file: file.read_text() for file in (TREE / "tests").rglob("test_*.py")}
    module = re.compile(rf"\brecscale\.{path.removesuffix('.py').replace('/', '.')}\b")
    importing = {file for file, text in texts.items() if module.search(text)}
    folder, name = TREE / "tests" / Path(path).parent, Path(path).stem
    if path.startswith("pallas_kernels"):
        folder, name = folder.parent, folder.name
    stages = []
    while folder != TREE / "tests":
        whole = len(folder.relative_to(TREE).parts) > 2  # tests/scaling/laws with all below it, of tests/scaling none
        own = set((folder.rglob if whole else folder.glob)("test_*.py"))
        files = own if stages else own | importing
        if path.startswith("pallas_kernels"):
            uses = [file for file in (TREE / "pallas_kernels").glob("*/*.py") if name in file.read_text()]
            operations = {name, *(file.parent.name for file in uses)}
            files = {file for file in files if any(one in texts[file] for one in operations)}
        order = {f: (name not in f.stem, f not in importing, f not in own, name not in texts[f], f) for f in files}
        files = sorted(files, key=order.get)
        names = [str(file.relative_to(TREE)) for file in files]
        stages.append([name for name in names if not any(name in stage for stage in stages)])
        folder = folder.parent
    if path.startswith("models/") and len(stages) > 1:
        stages[-1] += ["-k", " or ".join(built_of(path))]
    return [stage for stage in stages if stage]


def built_of(path):
    """Names of a module, of those below models/ that import it, directly or not, and of the architectures in them."""
    texts = {file.stem: file.read_text() for file in (TREE / "models").rglob("*.py")}
    found, new = set(), {Path(path).stem}
    while new:
        found |= new
        word = re.compile(rf"^ *(?:from|import) .*\b(?:{'|'.join(new)})\b", re.MULTILINE)
        new = {name for name, text in texts.items() if word.search(text)} - found
    listed = re.findall(r'"(\w+)": "recscale\.models\.[\w.]*?(\w+):', texts["registry"])
    return sorted(found | {name for name, module in listed if module in found})


def attempt(fault, stages, usual, limit):
    """The fault with its outcome: `by`, the test that noticed it, or None; `timed_out`, the test that was running when
    time was up, or None; and the seconds of processor time.

    stages: arguments of pytest, one run after the other until one fails. usual: seconds they take without the fault.
    """
    path, spent, by, timed_out = TREE / fault["path"], 0.0, None, None
    data, allowed = path.read_bytes(), min(limit, 60 + 10 * usual)
    before = data[fault["start"] : fault["stop"]].decode()
    try:
        path.write_bytes(data[: fault["start"]] + fault["text"].encode() + data[fault["stop"] :])
        for stage in stages:
            left = max(allowed - spent, 1.0)
            status, output, seconds = _pytest("-x", "-v", "-n", "0", "--tb=line", *stage, seconds=left)
            spent += seconds
            if status is None:
                last = next((line for line in reversed(output.splitlines()) if "::" in line), "collection")
                by, timed_out = (None, last[:160]) if allowed == limit else ("too slow", None)
                break
            if status not in (0, 5):  # 5: nothing was selected
                failed = [
                    line[:160] for line in output.splitlines() if line.startswith(("FAILED tests/", "ERROR tests/"))
                ]
                by = (failed or [f"exit {status}"])[0]
                break
    finally:
        path.write_bytes(data)
    return fault | dict(before=before, by=by, timed_out=timed_out, seconds=round(spent, 1))


def table(done):
    """Markdown: share noticed per folder; what timed out was not."""
    rows = ["| folder | faults | noticed | timed out |", "|---|---|---|---|"]
    for folder in [*FOLDERS, "all"]:
        own = [one for one in done if folder in (one["folder"], "all")]
        if own:
            noticed, late = (sum(one[key] is not None for one in own) for key in ("by", "timed_out"))
            rows.append(f"| {folder} | {len(own)} | {noticed} ({noticed / len(own):.0%}) | {late} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=120, help="faults of the sample, all folders together")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--workers", type=int, default=2, help="processes that measure what the tests execute")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of processor time per fault")
    parser.add_argument(
        "--for", dest="budget", type=float, default=float("inf"), help="begin nothing after so many seconds"
    )
    parser.add_argument("--nearest", action="store_true", help="measure nothing; try the tests that stand nearest")
    parser.add_argument("--table", action="store_true", help="print what was found, try nothing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the fault under test is taken back, what it started ended
    ends, results = time.monotonic() + options.budget, WORK / f"{_commit(ROOT)[:8]}-seed{options.seed}.jsonl"
    if not options.table:
        copy()
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    measured = None if options.table or options.nearest else measure(options.workers, ends)
    tried = {(one["path"], one["start"], one["text"]) for one in done}
    for fault in draw(options.number, options.seed) if measured or options.nearest else ():
        if time.monotonic() > ends:
            break
        if (fault["path"], fault["start"], fault["text"]) not in tried:
            stages, usual = nearest(fault["path"]), options.limit
            if measured:
                tests = tests_of(fault["path"], fault["line"], *measured)
                usual = sum(measured[1][test] for test in tests)
                (WORK / "ids.txt").write_text("\n".join(tests))
                stages = [[f"@{WORK / 'ids.txt'}"]] if tests else []
            done.append(attempt(fault, stages, usual, options.limit))
            with results.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(
                f"{done[-1]['path']}:{done[-1]['line']} {done[-1]['by'] or 'SURVIVED'} ({done[-1]['seconds']} s)",
                flush=True,
            )
    print(f"\nsample of seed {options.seed}\n\n{table(done)}\n\nsurvivors:")
    for one in done:
        if one["by"] is None:
            late = f"  timed out: {one['timed_out']}" if one["timed_out"] else ""
            print(f"{one['path']}:{one['line']}  {one['before']!r} -> {one['text']!r}{late}")


if __name__ == "__main__":
    main()
