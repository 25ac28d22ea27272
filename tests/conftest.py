"""Shared by all tests: compiled programs are cached on disk, so one that several tests (or both workers) need is
compiled once. The cache holds the same machine code a fresh compilation gives.

Checks of an architecture marked `thorough` run at every run on one architecture of each family, and on all the others
in the slow stage."""

import contextlib
import gc
import os
from importlib.metadata import version
from pathlib import Path

import jaxtyping
import pytest
from checked_types import of_arrays_only

# It sets up logging as it is imported, and would close what pytest captures by then. Not everywhere installed.
with contextlib.suppress(ImportError):
    import submitit  # noqa: F401

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most programs of the tests, and of processes they start, run once: compiling them quickly is what counts.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Threads of XLA's CPU client. Interpreted GPU kernels run every warpgroup in a callback of its own, which waits for the
# others: with fewer threads than that (a machine or a container of one core) they wait for ever.
os.environ["NPROC"] = str(max(8, int(os.environ.get("NPROC") or os.cpu_count() or 1)))
# XLA's older code generator for CPUs, which compiles in half the time of the newer one; from jax 0.11 on it is gone.
_OLDER = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jax").split(".")[:2])) < (0, 11) and _OLDER not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_OLDER}".strip()

# The modules under test are decorated with this as they are imported.
jaxtyping.jaxtyped = of_arrays_only(jaxtyping.jaxtyped)


@pytest.fixture(autouse=True, scope="session")
def _nothing_for_nobody():
    """Training tests draw no million rows to know the constants of their log (tests of the constants say how many they
    want). And JAX words no error that is caught: it does so at each random key of a program it traces, in a time that
    grows with the program."""
    tracer = "jax._src.interpreters.partial_eval.DynamicJaxprTracer"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
        patch.setattr(f"{tracer}._origin_msg", lambda self: "", raising=False)
        patch.setattr("recscale.scaling.data.known_truth.card.card_rows", lambda config: 2**14)
        yield
        return
    yield


@pytest.fixture(autouse=True, scope="module")
def _programs_of_the_fitter_are_optimised(request):
    """They run long and often, unlike all others."""
    name = "jax_disable_most_optimizations"
    fits = {"laws", "report", "notebooks", "test_quickstart.py"} & {*request.path.parts}
    import jax  # which reads the variables above when it is imported

    before = jax.config.values[name]
    jax.config.update(name, before and not fits)
    yield
    jax.config.update(name, before)


FLAGSHIPS = {"rankmixer", "tokenmixer_large", "mixformer", "pkm", "dcnv2"}


def pytest_collection_finish():
    """Modules, and what they hold, are never garbage: looking through them again and again is a tenth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("thorough") and item.callspec.params["name"] not in FLAGSHIPS:
            item.add_marker(pytest.mark.slow)
