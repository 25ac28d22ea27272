"""The choice of implementation: the device's kernel, a logged fallback, or a clear refusal."""

import importlib.metadata
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from recscale.models.layers.per_token import PerTokenFFN
from recscale.pallas_kernels import blocks, cases, dispatch, names, targets
from recscale.pallas_kernels.dispatch import asked, choose, recording, resolve
from recscale.pallas_kernels.grouped_matmul import grouped_matmul
from recscale.pallas_kernels.hybrid_attention import hybrid_attention
from recscale.pallas_kernels.per_token_ffn import per_token_matmul
from recscale.pallas_kernels.product_key_topk import product_key_topk
from recscale.pallas_kernels.sparse_gather import sparse_dot, sparse_gather
from recscale.pallas_kernels.targets import compiling_for, get_target
from recscale.pallas_kernels.w8a16_matmul import quantize_int8, w8a16_matmul
from recscale.scaling.counting.jaxpr_flops import count_flops

H100 = get_target("h100")


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


@pytest.fixture
def on_h100(monkeypatch, tmp_path):
    """An H100 that is not there, and a folder of its own for what was measured on it."""
    monkeypatch.setattr(targets, "current", lambda: H100)
    monkeypatch.setattr(targets, "current_platform", lambda: "gpu")
    monkeypatch.setattr(blocks, "tuned_path", lambda operation, kind: tmp_path / f"{operation}.json")
    blocks._tuned.cache_clear()
    yield
    blocks._tuned.cache_clear()


def measured(operation, times_xla):
    blocks.write_tuned(operation, H100.device_kind, "pallas_gpu", {}, times_xla, {"device": "a test"})


def test_on_a_device_none_takes_measured_kernels_only(on_h100, caplog):
    with caplog.at_level(logging.WARNING):
        assert resolve("unmeasured", None, {"pallas_gpu": None}) == "xla"
    assert "not measured to be faster on this kind of device" in caplog.text
    assert resolve("unmeasured", "pallas_gpu", {"pallas_gpu": None}) == "pallas_gpu"
    with compiling_for(H100):
        assert resolve("unmeasured", None, {"pallas_gpu": None}) == "pallas_gpu"
        assert resolve("unmeasured", None, {"pallas_gpu": None}, measured_only=True) == "xla"
    measured("fast", {"a": 3.0, "b": 0.9})
    assert resolve("fast", None, {"pallas_gpu": None}) == "pallas_gpu"
    assert resolve("fast", None, {"pallas_gpu": None}, measured_only=True) == "pallas_gpu"


@pytest.mark.parametrize(
    "times, faster",
    [({"a": 1.2}, True), ({"a": 2.0, "b": 0.4}, False), ({"a": 0.5, "b": None}, False), ({"a": None}, True)],
)
def test_a_kernel_must_beat_xla_to_be_chosen(on_h100, times, faster):
    measured("either", times)
    assert blocks.beats_xla("either", "pallas_gpu", H100) is faster
    assert not blocks.beats_xla("either", "pallas_tpu", H100) and not blocks.beats_xla("either", "pallas_gpu", None)


def calls():
    """Operation -> a call of every function that serves it."""
    x, ids = jnp.ones((2, 3, 128), jnp.bfloat16), jnp.zeros((2, 4), jnp.int32)
    wq, scale = quantize_int8(jnp.ones((128, 64)))
    q, k = jnp.ones((2, 5, 2, 16), jnp.bfloat16), jnp.ones((2, 40, 2, 16), jnp.bfloat16)
    return {
        "product_key_topk": [lambda **o: product_key_topk(jnp.ones((4, 1, 2, 8)), jnp.ones((1, 2, 16, 8)), 4, **o)],
        "sparse_gather": [
            lambda **o: sparse_gather(jnp.ones((9, 128)), ids, jnp.ones((2, 4)), **o),
            lambda **o: sparse_dot(jnp.ones((9, 128)), ids, jnp.ones((2, 128)), **o),
        ],
        "hybrid_attention": [lambda **o: hybrid_attention(q, k, k, jnp.asarray([3, 40]), scale=0.25, **o)[0]],
        "w8a16_matmul": [lambda **o: w8a16_matmul(x, wq, scale, **o)],
        "per_token_ffn": [lambda **o: per_token_matmul(x, jnp.ones((2, 128, 64)), token_first=True, **o)],
        "grouped_matmul": [lambda **o: grouped_matmul(x[0], jnp.ones((2, 128, 64)), jnp.asarray([1, 2]), **o)],
    }


@pytest.mark.parametrize("operation", ["w8a16_matmul", "per_token_ffn", "grouped_matmul"])
def test_what_xla_does_well_stays_with_it_also_for_a_chip_that_is_not_here(operation, on_h100):
    [call] = calls()[operation]
    served: dict = {}
    with compiling_for(H100), recording(served):
        jax.eval_shape(lambda: call())
    [((name, reason),)] = [names.items() for names in served.values()]
    assert name == "xla" and "not measured to be faster" in reason


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_the_environment_names_what_none_stands_for(operation, monkeypatch):
    """Every operation, for itself and for all; a caller's own name comes first."""
    for call in calls()[operation]:
        for text, chosen in (
            ("", "xla"),
            ("reference", "reference"),
            (f"{operation} = reference", "reference"),
            ("sparse_gather=xla,hybrid_attention=xla", "xla"),
        ):
            monkeypatch.setenv("RECSCALE_IMPLEMENTATION", text)
            served: dict = {}
            with recording(served):
                jax.eval_shape(lambda call=call: call())  # a function of its own: shapes are cached
                assert [list(names) for names in served.values()] == [[chosen]], (text, served)
        monkeypatch.setenv("RECSCALE_IMPLEMENTATION", f"{operation}=pallas_gpu")
        with pytest.raises(NotImplementedError, match="cannot run as 'pallas_gpu'"):
            call()
        jax.eval_shape(lambda call=call: call(implementation="xla"))


def test_wrong_names_in_the_environment_are_errors(monkeypatch):
    monkeypatch.setenv("RECSCALE_IMPLEMENTATION", "sparse_gater=xla")
    with pytest.raises(ValueError, match="names operation 'sparse_gater'; did you mean 'sparse_gather'"):
        asked("hybrid_attention", None)
    monkeypatch.setenv("RECSCALE_IMPLEMENTATION", "sparse_gather=xls")
    assert asked("hybrid_attention", None) is None
    with pytest.raises(ValueError, match="did you mean 'xla'"):
        asked("sparse_gather", None)


def test_a_choice_is_noted_with_its_reason():
    served: dict = {}
    with recording(served):
        resolve("noted", None, {"pallas_gpu": "needs Hopper"}, platform="gpu")
        resolve("noted", "reference", {})
    assert served == {"noted": {"xla": "pallas_gpu: needs Hopper", "reference": "asked for"}}
    resolve("noted", "xla", {})
    assert "xla" in served["noted"] and served["noted"]["xla"] == "pallas_gpu: needs Hopper"


def test_a_layer_fuses_where_asked_for_or_measured(on_h100, monkeypatch):
    """Without a name a feed-forward layer is two products, until the environment or a measurement says otherwise."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 64)), jnp.bfloat16)

    def served(activation="gelu"):
        found: dict = {}
        with recording(found):
            layer = PerTokenFFN(2, 64, 64, activation=activation, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
            jax.eval_shape(layer, x)
        return {operation: list(names) for operation, names in found.items()}

    assert served() == {}
    monkeypatch.setenv("RECSCALE_IMPLEMENTATION", "per_token_ffn=xla")
    assert served() == {"per_token_ffn": ["xla"]} and served("tanh") == {}
    monkeypatch.delenv("RECSCALE_IMPLEMENTATION")
    measured("per_token_ffn", {"a": 1.5})
    assert served() == {"per_token_ffn": ["pallas_gpu"]} and served("gelu_erf") == {}
    with targets.partitioned(2):
        assert served() == {}


class Doubled:
    """A foreign kernel: twice the product."""

    @staticmethod
    def obstacle(target, x_shape, w_shape, x_dtype):
        return "too many rows for it" if x_shape[0] > 3 else None

    @staticmethod
    def multiply(x, w, group_sizes, transposed, *, target, interpret):
        return 2 * jax.lax.ragged_dot(x, w, group_sizes)


@pytest.fixture
def foreign(monkeypatch):
    """Another distribution that brings a kernel of `grouped_matmul` named "doubled"."""
    entry = importlib.metadata.EntryPoint("grouped_matmul.doubled", f"{__name__}:Doubled", dispatch._GROUP)
    found = {dispatch._GROUP: {entry.name: entry}}

    monkeypatch.setattr(names, "_brought", lambda group: found.get(group, {}))


@pytest.mark.parametrize("name", ["doubled", f"{__name__}:Doubled"])
def test_another_distribution_brings_a_kernel(foreign, name, monkeypatch):
    """By its name or address, from a caller or the environment; refused and unknown names are as clear as ours."""
    x, w, sizes = jnp.ones((3, 8)), jnp.ones((2, 8, 4)), jnp.asarray([1, 2])
    served: dict = {}
    with recording(served):
        np.testing.assert_array_equal(grouped_matmul(x, w, sizes, implementation=name), 16)
        monkeypatch.setenv("RECSCALE_IMPLEMENTATION", f"grouped_matmul={name}")
        np.testing.assert_array_equal(grouped_matmul(x, w, sizes), 16)
    assert served == {"grouped_matmul": {name: "asked for"}}
    with pytest.raises(NotImplementedError, match="cannot run as .*: too many rows for it"):
        grouped_matmul(jnp.ones((4, 8)), w, sizes)
    monkeypatch.delenv("RECSCALE_IMPLEMENTATION")
    np.testing.assert_array_equal(grouped_matmul(x, w, sizes), 8)
    with pytest.raises(ValueError, match="did you mean 'doubled'"):
        grouped_matmul(x, w, sizes, implementation="doubles")
    with pytest.raises(ValueError, match="implementation is 'doubled'"):  # of another operation
        hybrid_attention(*3 * [jnp.ones((2, 3, 2, 4))], jnp.asarray([1, 2]), scale=1.0, implementation="doubled")


def test_a_kernel_is_compiled_for_a_target_of_its_platform(on_h100):
    """Elsewhere it is refused, or interpreted as if there were one."""
    request = ((4, 128), (2, 128, 64), jnp.bfloat16)
    backend = choose("grouped_matmul", "pallas_gpu", False, *request)
    assert (backend.name, backend.target, backend.interpret) == ("pallas_gpu", H100, False)
    topk = ((4, 1, 2, 8), (1, 2, 16, 8), 4, (jnp.float32, jnp.float32))
    with pytest.raises(NotImplementedError, match="it needs a TPU of a known kind, or interpret=True; .* for h100"):
        choose("product_key_topk", "pallas_tpu", False, *topk)
    assert choose("product_key_topk", "pallas_tpu", True, *topk).target == get_target("tpu-v5e")
    with pytest.raises(ValueError, match="interpret=True needs a Pallas implementation, but 'xla' was chosen"):
        choose("product_key_topk", "xla", True, *topk)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_float32_is_multiplied_as_float32_on_every_device(operation):
    """Matrix units round float32 operands unless told not to: references never round, XLA paths not float32 inputs."""
    for case in cases.cases(operation):
        if case.group == "bench":
            continue
        inputs = [leaf for leaf in jax.tree.leaves(case.structs()) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        low = any(leaf.dtype == jnp.bfloat16 for leaf in inputs)
        for name in ("reference",) if low else ("reference", "xla"):
            jaxpr = jax.make_jaxpr(lambda *a, case=case, name=name: case.call(*a, implementation=name))(*case.structs())
            for equation in equations(jaxpr.jaxpr):
                if equation.primitive.name in ("dot_general", "ragged_dot_general"):
                    kinds = {variable.aval.dtype.name for variable in equation.invars[:2]}
                    precise = "HIGHEST" in str(equation.params["precision"])
                    assert "float32" not in kinds or precise, (case.name, name, equation)


@pytest.mark.parametrize(
    "operation, name, target, kernel",
    [
        ("w8a16_matmul", "w8-64", "h100", "pallas_gpu"),
        ("sparse_gather", "gather-pub-backward", "h100", "pallas_gpu"),
        ("grouped_matmul", "ragged", "h100", "pallas_gpu"),
        ("sparse_gather", "gather-pub", "tpu-v6e", "pallas_tpu_sc"),
    ],
)
def test_kernels_of_every_kind_count_at_their_cost(operation, name, target, kernel):
    """Mosaic GPU and SparseCore kernels are no `pallas_call`: their FLOPs must not be 0."""
    case = next(case for case in cases.cases(operation) if case.name == name)
    with compiling_for(target):
        counted = count_flops(lambda *arrays: case.call(*arrays, implementation=kernel), *case.structs())
    forward = case.flops // 2 if name.endswith("backward") else 0  # the trace of a backward case holds its forward too
    assert counted == case.flops + forward
