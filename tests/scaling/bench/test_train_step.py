"""The benchmark's rivals compute the same thing, and its bookkeeping is right. Speed is for `recscale bench`."""

import dataclasses

import numpy as np
import pytest

from recscale.models.inputs import Field, Schema, Sequence
from recscale.scaling import host_memory
from recscale.scaling.bench import timing, train_step
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.scaling.bench.training_steps import Shape

TINY = Shape(rows=32, tokens=4, width=8, hidden=12, layers=2)


@pytest.fixture(scope="module")
def ours():
    """Losses of three Adam steps, the weights they start from, and the batch."""
    step, weights, batch = train_step.jax_step(TINY, 1e-2)
    return [step(1) for _ in range(3)], weights, batch


@pytest.mark.parametrize("layout", ["baddbmm", "bmm", "einsum"])
def test_torch_model_is_the_same_model_with_the_same_optimiser(ours, layout):
    """Three Adam steps from the same weights on the same batch give the same losses."""
    torch_rankmixer = pytest.importorskip("recscale.scaling.bench.torch_rankmixer", exc_type=ImportError)
    losses, weights, batch = ours
    x, labels = train_step.tokens_of(batch)
    theirs, _ = torch_rankmixer.make_step(weights, x, labels, layers=2, layout=layout, rate=1e-2, compiled=False)
    np.testing.assert_allclose(losses, [theirs(1) for _ in range(3)], rtol=1e-5)
    assert losses[2] < losses[0]


def test_without_torch_there_is_an_instruction_and_our_half(monkeypatch):
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: None)
    result = train_step.race_torch(TINY, rounds=2, per_round=1)
    assert result["ratio"] is None and result["torch"] is None and "recscale[bench]" in result["note"]
    assert result["rows_per_s"] == pytest.approx(1e3 * 32 / result["jax"]["median_ms"])
    assert result["jax"]["turns"] == 2


def test_turns_alternate_after_an_untimed_step():
    calls = []
    rivals = {name: lambda steps, name=name: calls.append((name, steps)) for name in "ab"}
    samples = timing.alternate(rivals, rounds=2, per_round=3)
    settling, turns = calls[:2], calls[2:]
    assert [name for name, _ in settling] == ["a", "b"]
    assert turns == [("a", 1), ("a", 3), ("b", 1), ("b", 3)] * 2
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2}


def test_time_of_a_turn_is_per_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def run(steps):
        clock[0] += 5.0 * steps

    assert timing.alternate({"slow": run}, rounds=1, per_round=4)["slow"][0].wall_s == 5.0


def test_summary_of_samples():
    samples = [timing.Sample(wall, 2 * wall) for wall in (0.001, 0.002, 0.003, 0.004, 0.010)]
    found = timing.summary(samples)
    assert found["median_ms"] == pytest.approx(3) and found["min_ms"] == pytest.approx(1)
    assert found["cpu_ms"] == pytest.approx(6) and found["turns"] == 5


def test_fixed_batch_follows_its_schema():
    schema = Schema((Field("id", "user", 4, vocabulary=9), Field("x", "candidate", 3)))
    batch = FixedBatch(schema, 6, 2).batch(5)
    assert batch.user.ids["id"].shape == (6,) and batch.candidates.dense["x"].shape == (6, 2, 3) and batch.rows == 12
    with pytest.raises(ValueError, match="histories"):
        FixedBatch(dataclasses.replace(schema, sequences=(Sequence("s", 2, (Field("e", "user", 1),)),)), 6)


def test_keeping_memory_sets_malloc_or_says_it_cannot(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, name, value):
            asked.append((name, value))
            return 1

    monkeypatch.setattr(host_memory, "_kept", False)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    assert host_memory.keep_freed_memory() and host_memory.keeps_freed_memory()
    assert dict(asked) == {-4: 0, -1: 2**31 - 1, -8: 1}
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(host_memory, "_kept", False)
    assert not host_memory.keep_freed_memory() and not host_memory.keeps_freed_memory()


def test_huge_pages_are_asked_for_where_offered_and_not_twice(monkeypatch):
    monkeypatch.setattr(host_memory, "_offered", lambda: True)
    assert host_memory.huge_page_environment({}) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    kept = host_memory.huge_page_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    assert kept == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}
    assert host_memory.huge_page_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {}
    monkeypatch.setattr(host_memory, "_offered", lambda: False)
    assert host_memory.huge_page_environment({}) == {}


def test_only_the_command_itself_starts_again(monkeypatch):
    started = []
    monkeypatch.setattr(host_memory.os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr(host_memory, "huge_page_environment", lambda: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    monkeypatch.setattr(host_memory.sys, "argv", ["pytest"])
    host_memory.restart_with_huge_pages()
    assert not started
    monkeypatch.setattr(host_memory.sys, "argv", ["/somewhere/bin/recscale", "bench", "memory"])
    monkeypatch.setattr(host_memory.sys, "orig_argv", ["python", "/somewhere/bin/recscale", "bench", "memory"])
    host_memory.restart_with_huge_pages()
    ((program, arguments, environment),) = started
    assert arguments == [program, "/somewhere/bin/recscale", "bench", "memory"]
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
