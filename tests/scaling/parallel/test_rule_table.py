"""Meshes by their text, and which axes of an array the rule table splits."""

import itertools
import subprocess
import sys

import forced_devices
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from recscale import models
from recscale.models import registry
from recscale.scaling import parallel
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.scaling.counting.abstract import abstract_model
from recscale.scaling.counting.schemas import load_schema
from recscale.scaling.training import get_config
from recscale.scaling.training.preflight import device_bytes, state_bytes
from recscale.scaling.training.step import make_trainer


class Mesh:
    """All that a rule asks of a mesh: its axes."""

    def __init__(self, **axes):
        self.shape = axes


@pytest.mark.parametrize(
    "text, axes",
    [
        ("16x16", {"data": 16, "tensor": 16}),
        ("8", {"data": 8}),
        ("data=4,fsdp=2,tensor=2", {"data": 4, "fsdp": 2, "tensor": 2}),
        ("expert=8, token=4", {"expert": 8, "token": 4}),
    ],
)
def test_meshes_by_their_text(text, axes):
    assert list(parallel.parse_mesh(text).items()) == list(axes.items())


@pytest.mark.parametrize(
    "text, message",
    [
        ("2x2x2", "has 3 sizes"),
        ("data=2,tensr=2", "no axis 'tensr'; did you mean 'tensor'"),
        ("data=2,data=4", "names axis 'data' twice"),
        ("data=two", "size of axis 'data' is 'two', expected a positive integer"),
        ("0x4", "expected a positive integer"),
        ("", "expected a positive integer"),
    ],
)
def test_a_mesh_that_cannot_be_read_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        parallel.parse_mesh(text)


def test_a_mesh_needs_its_devices():
    devices = np.array(jax.devices() * 4)
    mesh = parallel.make_mesh({"data": 1, "tensor": 1}, devices)
    assert dict(mesh.shape) == {"data": 1, "tensor": 1}
    with pytest.raises(ValueError, match="mesh data=8,tensor=8 needs 64 devices"):
        parallel.make_mesh({"data": 8, "tensor": 8}, devices)


@pytest.mark.parametrize(
    "names, shape, mesh, expected",
    [
        (("tokens", "embed", "hidden"), (8, 64, 256), Mesh(data=2, tensor=4), P(None, None, "tensor")),
        (("tokens", "embed", "hidden"), (8, 64, 256), Mesh(fsdp=4, tensor=2, token=8), P("token", "fsdp", "tensor")),
        (("tokens", "hidden", "embed"), (8, 256, 64), Mesh(tensor=4), P(None, "tensor")),
        (("hidden", "heads"), (64, 64), Mesh(tensor=4), P("tensor")),  # one mesh axis splits one axis of an array
        (("embed", "hidden"), (64, 30), Mesh(tensor=4), P()),  # 30 does not divide by 4
        (("rows", "embed"), (4096, 16), Mesh(fsdp=4, tensor=8, data=2), P(("fsdp", "tensor"))),
        (("rows", "embed"), (1000, 16), Mesh(fsdp=16, tensor=8), P("tensor", "fsdp")),  # 1000 divides by 8 alone
        ((None, "experts", "hidden"), (2, 8, 64), Mesh(expert=8), P(None, "expert")),
        (("embed",), (64,), Mesh(data=8), P()),
    ],
)
def test_axes_are_split_by_rule(names, shape, mesh, expected):
    assert parallel.spec(names, shape, mesh) == expected


@pytest.mark.parametrize(
    "name, shape, mesh, expected",
    [
        ("slots", (1, 4096, 64), Mesh(tensor=4), P(None, "tensor")),  # narrow: by rows
        ("slots", (1, 4096, 512), Mesh(tensor=4), P(None, None, "tensor")),  # 128 columns each
        ("slots", (1, 2025, 512), Mesh(fsdp=2, tensor=2, data=2), P(None, None, ("fsdp", "tensor"))),
        ("slots", (1, 4096, 512), Mesh(tensor=8), P(None, "tensor")),
        ("slots", (1, 4096), Mesh(tensor=4), P(None, "tensor")),  # one number a row
        ("slots", (1, 4096, 512), Mesh(data=8), P()),
        ("rows", (1, 4096, 512), Mesh(tensor=4), P(None, "tensor")),  # embeddings: always by rows
    ],
)
def test_values_are_split_by_rows_or_where_they_are_wide_by_columns(name, shape, mesh, expected):
    assert parallel.table_spec(name, 1, jax.ShapeDtypeStruct(shape, "float32"), mesh) == expected


def test_names_must_fit():
    with pytest.raises(ValueError, match="no rule for logical axis 'widht'"):
        parallel.spec(("widht",), (4,), Mesh(tensor=2))
    with pytest.raises(ValueError, match="has 1 axis names"):
        parallel.spec(("embed",), (4, 4), Mesh(tensor=2))


def test_requests_are_split_over_data_and_fsdp():
    assert parallel.batch_spec(Mesh(data=2, tensor=2)) == P("data")
    assert parallel.batch_spec(Mesh(data=2, fsdp=4)) == P(("data", "fsdp"))
    assert parallel.batch_spec(Mesh(tensor=2)) == P()
    assert parallel.batch_ways(Mesh(data=2, fsdp=4, tensor=8)) == 8


def test_every_rule_names_axes_of_a_mesh():
    assert set(itertools.chain(*parallel.RULES.values(), parallel.BATCH_AXES)) == set(parallel.MESH_AXES)


def test_the_table_knows_every_axis_of_every_architecture():
    plain, events, content = map(load_schema, ("reference", "known_truth:long", "known_truth:content"))
    for name in models.list_models():
        schema = content if name == "lemur" else events if registry.reads_history(name) else plain
        model = abstract_model(name, schema)
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            names = variable.get_metadata().get("logical_axes") or ()
            assert set(names) <= set(parallel.RULES), (name, path, names)


def test_a_device_holds_its_part_of_the_optimiser_and_no_more():
    config = get_config("rankmixer")
    config.model.update({"tokens": 4, "width": 64, "hidden": 128, "layers": 1})
    mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
    shapes = make_trainer(config, FixedBatch(load_schema("reference"), 64), [(0, 1e-3)], 1, mesh).state_shapes()
    for part in (shapes.moments, shapes.slots):
        whole = [leaf for leaf in jax.tree.leaves(part) if leaf.sharding.is_fully_replicated]
        split = state_bytes(part) - state_bytes(whole)
        assert device_bytes(part) == split // 8 + state_bytes(whole)  # nothing is padded: what does not divide is whole
        assert state_bytes(whole) < 0.05 * state_bytes(part)
    by_rows = {leaf.sharding.spec for leaf in jax.tree.leaves((shapes.tables, shapes.slots))}
    assert by_rows == {P(None, "fsdp")}  # every replica's rows, never the replicas or the columns


def test_bytes_to_be_sent_follow_from_shapes():
    config = get_config("rankmixer")
    config.model.update({"tokens": 4, "width": 64, "hidden": 128, "layers": 2})
    source = FixedBatch(load_schema("reference"), 64)

    def predicted(**axes):
        mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))
        params = make_trainer(config, source, [(0, 1e-3)], 1, mesh).state_shapes().params
        return parallel.predicted_bytes(params, mesh, 64), state_bytes(params), device_bytes(params)

    # In each of two layers one sum forward and one backward, of 64 rows of four tokens, 64 numbers of 4 bytes wide.
    assert predicted(tensor=8)[0] == {"all-reduce": 2 * 2 * 64 * 4 * 64 * 4}
    sent, _, held = predicted(data=2, tensor=4)
    assert sent == {"all-reduce": 2 * 2 * 32 * 4 * 64 * 4 + held}
    sent, whole, held = predicted(fsdp=8)
    assert sent is not None and sent["all-reduce"] == whole and sent["all-gather"] <= held
    # Two exchanges a layer, of a fourth of all tokens; gains and biases of the two norms of each.
    tokens = 64 * 4 * 64 * 4
    sent = {"all-to-all": 2 * 2 * tokens / 4, "all-gather": tokens / 4, "all-reduce": tokens / 4 + 2 * 4 * 64 * 4}
    assert predicted(token=4)[0] == sent
    assert predicted(data=2, expert=4)[0] is None


def test_bytes_of_rows_follow_from_what_a_batch_reads():
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, "float32")

    lookup = parallel.Lookup(96, 80, array(1, 4096, 16), [array(1, 4096)])

    def predicted(**axes):
        return parallel.predicted_bytes(
            nnx.State({}), jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes)), 64, [lookup]
        )

    read, trained, ids = 80 * (16 + 1) * 4, 80 * 16 * 4, 96 * 4
    assert predicted(tensor=4) == {"all-reduce": read}
    # Where every device holds the table; where none does.
    assert predicted(data=8) == {"all-reduce": trained, "all-gather": (ids + 64) / 8}
    assert predicted(fsdp=8) == {"all-reduce": read + trained, "all-gather": (ids + 64) / 8}
    assert predicted(data=2, tensor=4) == {"all-reduce": read + trained, "all-gather": (ids + 64) / 2}


SCRIPT = """
import jax, numpy as np
from recscale.scaling import parallel
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.models.inputs import reference_schema
from recscale.scaling.training import get_config
from recscale.scaling.training.step import make_trainer

def train(name, settings, text):
    config = get_config(name)
    config.model.update(settings)
    config.training.eps = 1e-4  # Adam divides by the gradient's size: near 0 that would magnify the order of sums
    source = FixedBatch(reference_schema(fields=4), 32)
    mesh = parallel.make_mesh(parallel.parse_mesh(text), jax.devices()) if text else None
    trainer = make_trainer(config, source, [(0, 3e-3)], warmup=1, mesh=mesh)
    state = trainer.fresh_state()
    batch = source.batch(0) if mesh is None else trainer.put(source.batch(0))
    if mesh is not None:
        split = [leaf for leaf in jax.tree.leaves(state) if leaf.sharding.spec]
        assert split or text == "data=8", f"{name} on {text}: nothing of the state is split"
    for _ in range(3):
        state, metrics = trainer.step(state, batch)
    return jax.device_get((state, metrics["loss"]))

for name, settings, meshes in CASES:
    one = train(name, settings, "")
    for text in meshes:
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(train(name, settings, text)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=f"{name} on {text}")
        print("equal", name, text)
"""

RANKMIXER = ("rankmixer", {"tokens": 4, "width": 16, "hidden": 32, "layers": 1})
MSN = ("msn", {"tokens": 4, "width": 16, "hidden": 32, "layers": 2, "memory_slots": 256, "memory_topk": 4})


def _equal_to_one(*cases):
    env = forced_devices.environment(8)
    script = f"CASES = {cases!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == sum(len(meshes) for *_, meshes in cases)


@pytest.mark.slow
def test_eight_devices_split_by_rule_equal_one():
    _equal_to_one((*RANKMIXER, ["data=2,tensor=2,token=2"]))


@pytest.mark.slow
def test_every_mesh_equals_one_device():
    meshes = ["data=8", "fsdp=8", "data=2,tensor=4", "fsdp=2,tensor=2,token=2", "4x2"]
    wide = (MSN[0], MSN[1] | {"width": 256, "memory_slots": 64})  # values by columns, 128 a device
    _equal_to_one((*RANKMIXER, meshes), (*MSN, ["data=2,tensor=4", "fsdp=4,tensor=2"]), (*wide, ["data=4,tensor=2"]))


BYTES = """
import jax
from recscale.models.inputs import Field, Schema, Task
from recscale.scaling import parallel
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.scaling.resources import collective_bytes
from recscale.scaling.training import get_config
from recscale.scaling.training.run_resources import predicted_communication
from recscale.scaling.training.step import make_trainer

for name, settings, text in CASES:
    rows = (32, 4096, 4096, None)  # taken whole, and sorted for two fields together
    fields = [Field(f"f{i}", "user" if i < 2 else "candidate", 16, rows[i], f"t{rows[i]}") for i in range(4)]
    config = get_config(name)
    config.model.update(settings)
    source, mesh = FixedBatch(Schema(tuple(fields), (), (Task("click"),)), 64), parallel.run_mesh(text, 64)
    trainer = make_trainer(config, source, [(0, 1e-3)], 1, mesh)
    shapes = trainer.state_shapes()
    compiled = trainer.program.lower(shapes, trainer.put(source.batch(0))).compile()
    found, expected = collective_bytes(compiled.as_text()), predicted_communication(trainer, shapes)
    print(name, text, found, expected)
    assert found.keys() == expected.keys()
    for kind, size in expected.items():
        assert abs(found[kind] / size - 1) < 0.05, kind
    print("equal")
"""
NETWORK = {"tokens": 4, "width": 64, "hidden": 128, "layers": 2}
MIXER = {"tokenizer": "cut", "tokens": 4, "heads": 4, "width": 64, "hidden": 64, "layers": 2}
EXPERTS = MIXER | {"experts": 4, "active": 2, "shared_expert": False, "expert_path": "capacity"}


@pytest.mark.slow
def test_bytes_of_collectives_are_those_of_the_formulas():
    meshes = ["data=8", "fsdp=8", "data=2,fsdp=4", "tensor=8", "data=2,tensor=4", "token=4", "data=2,token=4"]
    cases = [("rankmixer", NETWORK, mesh) for mesh in meshes]
    cases += [("tokenmixer_large", MIXER, "token=4"), ("tokenmixer_large", EXPERTS, "expert=4")]
    env = forced_devices.environment(8)
    script = f"CASES = {cases!r}\n{BYTES}"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("equal") == len(cases)
