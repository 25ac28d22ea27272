"""The choice of implementation: the device's kernel, a logged fallback, or a clear refusal."""

import logging

import pytest

from recscale.pallas_kernels import blocks, implementation
from recscale.pallas_kernels.implementation import resolve
from recscale.pallas_kernels.targets import compiling_for, get_target


@pytest.mark.parametrize(
    ("platform", "obstacles", "expected"),
    [
        ("cpu", {"pallas_tpu": None, "pallas_gpu": None}, "xla"),
        ("tpu", {"pallas_tpu": None}, "pallas_tpu"),
        ("tpu", {"pallas_tpu": None, "pallas_tpu_sc": None}, "pallas_tpu_sc"),
        ("tpu", {"pallas_tpu": None, "pallas_tpu_sc": "no SparseCore"}, "pallas_tpu"),
        ("gpu", {"pallas_gpu": None}, "pallas_gpu"),
        ("gpu", {"pallas_gpu": "width 100 is not a multiple of 128"}, "xla"),
    ],
)
def test_none_takes_the_best_that_can_serve(platform, obstacles, expected):
    assert resolve("gather", None, obstacles, platform=platform) == expected


def test_a_fallback_is_logged_once_with_its_reason(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            resolve("once", None, {"pallas_gpu": "needs Hopper"}, platform="gpu")
    assert [r.getMessage() for r in caplog.records] == ["once runs on XLA (pallas_gpu: needs Hopper)"]


def test_a_forced_implementation_serves_or_says_why_not():
    assert resolve("gather", "pallas_gpu", {"pallas_gpu": None}, platform="cpu") == "pallas_gpu"
    assert resolve("gather", "reference", {}, platform="tpu") == "reference"
    with pytest.raises(NotImplementedError, match="gather cannot run as 'pallas_tpu': there is no such kernel"):
        resolve("gather", "pallas_tpu", {})
    with pytest.raises(ValueError, match="did you mean 'pallas_tpu'"):
        resolve("gather", "palas_tpu", {})


def test_on_a_device_none_takes_measured_kernels_only(monkeypatch, tmp_path, caplog):
    h100 = get_target("h100")
    monkeypatch.setattr(implementation, "current", lambda: h100)
    monkeypatch.setattr(implementation, "current_platform", lambda: "gpu")
    monkeypatch.setattr(blocks, "tuned_path", lambda operation, kind: tmp_path / f"{operation}.json")
    blocks._tuned.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert resolve("unmeasured", None, {"pallas_gpu": None}) == "xla"
    assert "never measured on this kind of device" in caplog.text
    assert resolve("unmeasured", "pallas_gpu", {"pallas_gpu": None}) == "pallas_gpu"
    with compiling_for(h100):
        assert resolve("unmeasured", None, {"pallas_gpu": None}) == "pallas_gpu"
    blocks.write_tuned("measured", h100.device_kind, {"pallas_gpu": {"d128": {"rows": 8}}}, {"device": "a test"})
    assert resolve("measured", None, {"pallas_gpu": None}) == "pallas_gpu"
    blocks._tuned.cache_clear()
