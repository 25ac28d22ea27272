"""What every registered architecture must satisfy; a new registry line is tested without a change here.

Each is tried as the tiny model of `tests/plugins/tiny_models.py`, in float64, which compiles nothing; compiled programs
are compared with that, of one architecture per family in the fast stage and of all in the slow one. The golden steps
lie in golden_steps.json; `RECSCALE_WRITE_GOLDEN=1 pytest tests/models/test_architectures.py -k golden` writes them anew
(delete the entries of models that no longer exist by hand).
"""

import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from in_float64 import in_float64
from tiny_models import C, R, config_of, data_of, model_of, schema_of, shaken_model, smooth_config_of

from recscale.models import build, count, list_models, reads_history, size_space
from recscale.models.inputs.examples import random_inputs
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops

NAMES = [*list_models(), "din+rankmixer"]

# Parameters that the task gradient does not reach in inference, each with its reason.
UNREACHED: dict[str, dict[str, str]] = {
    "lemur": {"['document']": "the encoder of items, which only training runs (a key): serving reads the bank"},
    "lmn": {"['target']": "the fixed projection of the memory loss, which only training has (a key)"},
    "tokenmixer_large": {"['auxiliary']": "heads of lower blocks, which only training has (a key)"},
    "ug_tokenmixer_large": {"['auxiliary']": "the same"},
}

GOLDEN = Path(__file__).with_name("golden_steps.json")

pytestmark = pytest.mark.parametrize("name", NAMES, scope="module")


def _is_float(path, variable):
    return jnp.issubdtype(variable.dtype, jnp.floating)


class Case:
    """A tiny model split into graph, floats and other state, and a batch of inputs with padding."""

    def __init__(self, name):
        self.schema, self.config, (self.inputs, self.labels, _) = schema_of(name), config_of(name), data_of(name)
        self.graph = nnx.split(nnx.eval_shape(lambda: model_of(name)), _is_float, ...)[0]
        self.params, self.rest = in_float64(lambda: nnx.split(model_of(name), _is_float, ...)[1:])()
        self.forward = in_float64(self.logits_of)
        self.gradients = in_float64(jax.value_and_grad(self.loss_of, argnums=(0, 1)))

    def model(self, params):
        return nnx.merge(self.graph, params, self.rest)

    def logits_of(self, params, inputs):
        return self.model(params)(inputs).logits

    def loss_of(self, params, values, inputs, labels):
        """Task loss, with the arrays of `floats` apart, so that it can be differentiated with respect to them."""
        logits = self.logits_of(params, with_floats(inputs, values))
        return jnp.mean(jnp.logaddexp(0.0, logits) - labels * logits)


@pytest.fixture(scope="module")
def case(name):
    return Case(name)


def floats(inputs):
    """The arrays an output may depend on: user fields, candidate fields, events."""
    events = {name: history.events for name, history in inputs.user.histories.items()}
    return inputs.user.fields, inputs.candidates.fields, events


def with_floats(inputs, values):
    user, candidates, events = values
    histories = {name: history.replace(events=events[name]) for name, history in inputs.user.histories.items()}
    return inputs.replace(
        user=inputs.user.replace(fields=user, histories=histories),
        candidates=inputs.candidates.replace(fields=candidates),
    )


def reads(name):
    """The histories of the schema that an architecture reads."""
    return {"clicks", "buys"} if name == "hyformer" else {"clicks"} if reads_history(name) else set()


@pytest.fixture
def optimised():
    """Programs as users compile them, which most tests do not need."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.mark.thorough
@pytest.mark.usefixtures("optimised")
def test_compiled_programs_give_the_same(case):
    arguments = case.params, floats(case.inputs), case.inputs, case.labels
    found = jax.jit(jax.value_and_grad(case.loss_of, argnums=(0, 1)))(*arguments)
    expected = case.gradients(*arguments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1e-3, np.abs(b).max(initial=0)))


def test_one_candidate_and_the_call_in_two(case):
    whole = case.forward(case.params, case.inputs)
    assert whole.shape == (R, C, 2) and np.isfinite(whole).all()
    state = in_float64(lambda p, user: case.model(p).encode_user(user))(case.params, case.inputs.user)
    # A state is arrays and nothing else: it can be stored and read again.
    leaves, tree = jax.tree.flatten(state)
    again = jax.tree.unflatten(tree, [np.array(leaf) for leaf in leaves])
    score = in_float64(lambda p, state, candidates: case.model(p).score(state, candidates).logits)
    np.testing.assert_array_equal(score(case.params, again, case.inputs.candidates), whole)
    first = jax.tree.map(lambda x: x[:, :1], case.inputs.candidates)
    one = case.forward(case.params, case.inputs.replace(candidates=first))
    np.testing.assert_allclose(one, whole[:, :1], rtol=1e-9, atol=1e-12)


def test_serving_changes_nothing(case):
    def after(params, inputs):
        model = case.model(params)
        model(inputs)
        return nnx.split(model, _is_float, ...)[1:]

    before = case.params, case.rest
    jax.tree.map(np.testing.assert_array_equal, in_float64(after)(case.params, case.inputs), before)


@pytest.mark.thorough
def test_bfloat16_stays_close_and_keeps_float32_outside(name, case):
    graph = nnx.split(
        nnx.eval_shape(lambda: build(name, case.schema, case.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)),
        _is_float,
        ...,
    )[0]

    def total(params):
        logits = nnx.merge(graph, params, case.rest)(case.inputs).logits
        return jnp.sum(logits**2), logits

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), case.params)
    (_, low), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    full = case.forward(case.params, case.inputs)
    # What rounding the parameters alone costs: a norm over few numbers may make much of it.
    rounded = case.forward(jax.tree.map(lambda x: np.asarray(jnp.bfloat16(x), x.dtype), case.params), case.inputs)
    room = max(0.05 * np.abs(full).max() + 0.01, 2 * np.abs(rounded - full).max())
    assert low.dtype == jnp.float32
    assert float(np.abs(low - full).max()) < room
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()


def test_empty_histories_and_padded_rows_are_finite(case):
    empty = {k: jax.tree.map(jnp.zeros_like, h) for k, h in case.inputs.user.histories.items()}
    inputs = case.inputs.replace(user=case.inputs.user.replace(histories=empty))
    user, candidates, events = floats(inputs)
    candidates = {k: x.at[1].set(0.0) for k, x in candidates.items()}
    value, grads = case.gradients(case.params, (user, candidates, events), inputs, case.labels)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_influence_by_gradient(name, case):
    """Own candidate, own request and valid events act on a logit; nothing else does."""
    inputs = case.inputs

    def logits(values):
        model = shaken_model(name, smooth_config_of(name))
        return model(with_floats(inputs, values)).logits.sum(axis=-1)

    user, candidates, events = in_float64(jax.jacrev(logits))(floats(inputs))
    same_request = np.eye(R, dtype=bool)
    for jacobian in user.values():  # [R, C, R', width]
        touched = np.abs(jacobian).max(axis=(1, 3)) > 0
        np.testing.assert_array_equal(touched, same_request)
    for jacobian in candidates.values():  # [R, C, R', C', width]
        touched = (np.abs(jacobian).max(axis=-1) > 0).reshape(R * C, R * C)
        np.testing.assert_array_equal(touched, np.eye(R * C, dtype=bool))
    for key, jacobian in events.items():  # [R, C, R', S, A]
        touched = np.abs(jacobian).max(axis=(1, 4)) > 0
        columns = touched.shape[-1]
        valid = np.arange(columns)[None] < np.asarray(inputs.user.histories[key].length)[:, None]
        np.testing.assert_array_equal(touched, same_request[:, :, None] & valid[None] & (key in reads(name)))


def test_nan_in_a_padded_candidate_or_event_stays_there(case):
    plain = case.forward(case.params, case.inputs)
    user, candidates, events = floats(case.inputs)
    lengths = {k: np.asarray(h.length) for k, h in case.inputs.user.histories.items()}
    junk = {
        k: jnp.where((np.arange(x.shape[1])[None] < lengths[k][:, None])[..., None], x, jnp.nan)
        for k, x in events.items()
    }
    candidates = {k: x.at[1, 2].set(jnp.nan) for k, x in candidates.items()}
    found = case.forward(case.params, with_floats(case.inputs, (user, candidates, junk)))
    others = np.ones((R, C), bool)
    others[1, 2] = False
    np.testing.assert_allclose(found[others], plain[others], rtol=1e-12)


def test_candidates_are_exchangeable_and_equal_single_rows(case):
    plain = case.forward(case.params, case.inputs)
    order = np.asarray([2, 0, 1])
    turned = jax.tree.map(lambda x: x[:, order], case.inputs.candidates)
    permuted = case.forward(case.params, case.inputs.replace(candidates=turned))
    np.testing.assert_allclose(permuted, plain[:, order], rtol=1e-9, atol=1e-12)
    single = jax.tree.map(lambda x: x.reshape(R * C, 1, *x.shape[2:]), case.inputs.candidates)
    repeated = jax.tree.map(lambda x: jnp.repeat(x, C, axis=0), case.inputs.user)
    rows = case.forward(case.params, case.inputs.replace(user=repeated, candidates=single))
    np.testing.assert_allclose(rows.reshape(R, C, 2), plain, rtol=1e-9, atol=1e-12)


def test_closed_forms_equal_the_tiny_program(name, case):
    # A batch of one row costs what the closed forms say of every row unless a fifth of it is encoded.
    whole = dict(encode_fraction=1.0, backward_fraction=1.0) if name == "lemur" else {}
    check_counts(name, case.schema, config_of(name, whole))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "dense"), [(54_321, True), (20_000, False), (1_000_000, False)])
def test_closed_forms_equal_the_program(name, full_schema, small_config, target, dense):
    schema = full_schema(dense=dense)
    check_counts(name, schema, small_config(name, schema, target))


def check_counts(name, schema, config):
    counted = count(name, schema, config)
    assert tree_params(abstract_model(name, schema, config)) == counted.dense_params
    function, arguments = forward_program(name, schema, config, 2, 3)
    expected = 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate + counted.forward_flops_step
    assert count_flops(function, *arguments) == expected
    function, arguments = train_program(name, schema, config, 1, 1)
    assert count_flops(function, *arguments) == counted.train_flops_per_row + counted.train_flops_step


@pytest.mark.thorough
def test_default_config_trains(name, schema):
    function, arguments = train_program(name, schema, None, 2, 3)
    jax.eval_shape(function, *arguments)
    offers = itertools.islice(size_space(name, schema, None, 1e6), 1)
    assert len(list(offers)) == 1


def test_replicas_under_vmap(case):
    other = jax.tree.map(lambda x: 1.5 * x, case.params)
    both = jax.tree.map(lambda a, b: np.stack([a, b]), case.params, other)
    found = in_float64(jax.vmap(case.logits_of, in_axes=(0, None)))(both, case.inputs)
    for i, params in enumerate((case.params, other)):
        np.testing.assert_allclose(found[i], case.forward(params, case.inputs), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def first_step(case, random_labels):
    """One Adam step: the largest gradient of every parameter, and the figures of a golden step."""
    inputs, labels = random_inputs(case.schema, 32, C, seed=3), random_labels((32, C, 2), seed=3)
    loss, (grads, _) = case.gradients(case.params, floats(inputs), inputs, labels)
    params, g = (
        np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])
        for tree in (case.params, grads)
    )
    # Adam's bias-corrected moments after one step are the gradient and its square.
    update = -1e-3 * g / (np.abs(g) + 1e-8)
    figures = {
        "loss": float(loss),
        "gradient_norm": np.linalg.norm(g),
        "update_norm": np.linalg.norm(update),
        "parameter_mean": (params + update).mean(),
        "parameter_rms": np.sqrt(np.square(params + update).mean()),
    }
    return jax.tree.map(lambda leaf: np.abs(leaf).max(), grads), figures


def test_task_gradient_reaches_every_parameter(name, first_step):
    for path, leaf in jax.tree_util.tree_leaves_with_path(first_step[0]):
        where = jax.tree_util.keystr(path)
        assert (float(leaf) > 0) != any(key in where for key in UNREACHED.get(name, {})), where


def test_golden_step(name, first_step):
    found = {key: float(value) for key, value in first_step[1].items()}
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("RECSCALE_WRITE_GOLDEN"):
        stored[name] = {key: float(f"{value:.9g}") for key, value in found.items()}
        GOLDEN.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    assert name in stored, f"no golden step for {name!r}; the first lines of this file say how to write one"
    for key, value in found.items():
        assert value == pytest.approx(stored[name][key], rel=1e-6, abs=1e-9), key
