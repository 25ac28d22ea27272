"""Exported models: any number of requests and candidates, equal to the model, loaded without flax or this package."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from flax import nnx
from small_models import small_config

from recscale.models import build, list_models
from recscale.models.inputs import CandidateSide, Content, Field, History, Schema, Sequence, Task, UserSide
from recscale.models.inputs.examples import random_inputs
from recscale.models.inputs.tables import EmbeddingTables, embed_candidates, embed_user, table_lookup
from recscale.models.layers.quantisation import Int8Kernel, quantize
from recscale.scaling.serving.export import export_model
from recscale.scaling.serving.export_command import export
from recscale.scaling.serving.served import load
from recscale.scaling.training import get_config, train
from recscale.scaling.training import load as run_model

NAMES = [*list_models(), "din+rankmixer"]
FAST = ("rankmixer", "hyformer")
SHAPES = ((3, 5), (1, 1), (7, 2))

pytestmark = pytest.mark.usefixtures("symbols")


def make_schema():
    """Both sides, id and dense fields, a bag, a history with times, content, two tasks."""
    fields = (
        Field("user", "user", 4, 40, group="who"),
        Field("age", "user", 3, group="who"),
        Field("tags", "user", 4, 30, group="when", bag=3),
        Field("item", "candidate", 6, 40, table="items", group="what"),
        Field("price", "candidate", 2, group="price"),
    )
    history = (Field("past_item", "user", 6, 40, table="items"), Field("action", "user", 2, 5))
    content = Content(40, 12, segments=(3, 2), query_length=2, histories=("clicks",))
    sequences = (Sequence("clicks", 6, history, timestamps=True),)
    return Schema(fields, sequences, (Task("click"), Task("buy")), content=content)


def request(schema, R, C, seed=0):
    """Ids and numbers of R requests with C candidates, as plain dictionaries."""
    draw = np.random.default_rng(seed)

    def ids(high, *shape):
        return draw.integers(0, high, shape).astype(np.int32)

    def normal(*shape):
        return draw.standard_normal(shape, dtype=np.float32)

    history = {
        "ids": {"past_item": ids(40, R, 6), "action": ids(5, R, 6), "content_item": ids(40, R, 6)},
        "dense": {},
        "length": ids(7, R),
        "delta_s": np.cumsum(ids(9999, R, 6), axis=1, dtype=np.int32),
    }
    user_ids = {"user": ids(40, R), "tags": ids(30, R, 3), "query": ids(9, R), "query_content": ids(12, R, 2)}
    user = {"ids": user_ids, "dense": {"age": normal(R, 3)}, "histories": {"clicks": history}}
    own = {"item": ids(40, R, C), "content": ids(12, R, C, 5), "content_item": ids(40, R, C)}
    return user, {"ids": own, "dense": {"price": normal(R, C, 2)}}


def flattened(tree):
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def logits_of(model, tables, schema, user, candidates):
    """What the model itself says."""
    histories = {name: History(**history) for name, history in user["histories"].items()}
    lookup = table_lookup(tables)
    state = model.encode_user(embed_user(schema, UserSide(user["ids"], user["dense"], histories), lookup))
    return model.score(state, embed_candidates(schema, CandidateSide(**candidates), lookup)).logits


def make(name):
    schema = make_schema()
    config = small_config(name, schema)
    model = build(name, schema, config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    tables = {key: 10.0 * rows for key, rows in EmbeddingTables(schema, rngs=nnx.Rngs(1)).arrays().items()}
    return model, tables, schema


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (folder, model, tables, schema), exported once."""
    found = {}

    def get(name):
        if name not in found:
            model, tables, schema = make(name)
            folder = tmp_path_factory.mktemp("export") / name.replace("+", "_")
            export_model(model, tables, schema, folder, about={"architecture": name})
            found[name] = folder, model, tables, schema
        return found[name]

    return get


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_the_artefact_is_the_model_at_odd_numbers_of_requests_and_candidates(exported, name):
    folder, model, tables, schema = exported(name)
    served = load(folder)
    own = jax.jit(lambda user, candidates: logits_of(model, tables, schema, user, candidates))
    for R, C in SHAPES if name in FAST else SHAPES[:1]:
        user, candidates = request(schema, R, C, seed=R)
        state = served.encode_user(served.lookup_user(user))
        logits = served.score(state, served.lookup_candidates(candidates))
        assert logits.shape == (R, C, 2) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, own(user, candidates), atol=1e-5, rtol=1e-5)


INT8 = ("rankmixer", "tokenmixer_large", "hyformer", "pkm", "dcnv2")


@pytest.mark.slow
@pytest.mark.parametrize("name", INT8)
def test_int8_kernels_are_off_by_half_a_scale_at_most(exported, tmp_path, name):
    folder, model, tables, schema = exported(name)
    manifest = export_model(model, tables, schema, tmp_path / "int8", w8a16=True)
    assert "within half a scale" in manifest["weights"] and (tmp_path / "int8" / "weights.npz").stat().st_size < (
        folder / "weights.npz").stat().st_size  # fmt: skip
    small = quantize(model, implementation="xla")
    whole, stored = nnx.state(model), nnx.state(small)
    found = 0
    for path, kernel in nnx.iter_modules(small):
        if isinstance(kernel, Int8Kernel):
            trained = functools.reduce(lambda at, key: at[key], path, whole)[...]
            scale = kernel.scale[...][..., None, :]
            scale = scale.swapaxes(-2, -1) if kernel.transposed else scale
            assert (jnp.abs(kernel[...] - trained) <= 0.5 * scale * (1 + 1e-5)).all(), path
            found += 1
    arrays = np.load(tmp_path / "int8" / "weights.npz")
    assert found and sum(array.dtype == np.int8 for array in arrays.values()) == found
    assert len(arrays) == len(jax.tree.leaves(stored))
    user, candidates = request(schema, 3, 5)
    served = load(tmp_path / "int8")
    logits = served.score(served.encode_user(served.lookup_user(user)), served.lookup_candidates(candidates))
    np.testing.assert_allclose(logits, logits_of(small, tables, schema, user, candidates), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(logits, logits_of(model, tables, schema, user, candidates), atol=0.1)


def test_the_manifest_says_what_goes_in(exported):
    folder, _, _, schema = exported("rankmixer")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["architecture"] == "rankmixer" and manifest["tasks"] == ["click", "buy"]
    assert manifest["schema"] == json.loads(json.dumps(schema.to_dict()))
    assert manifest["inputs"]["user"]["ids"]["tags"] == "int32[R, 3]"
    assert manifest["inputs"]["candidate_vectors"]["fields"]["item"] == "float32[R, C, 6]"
    user, _ = request(schema, 2, 2)
    del user["ids"]["tags"]
    with pytest.raises(ValueError, match="user.ids lacks tags and has unknown nothing"):
        load(folder).lookup_user(user)


def test_loading_needs_jax_and_numpy_only(exported, tmp_path):
    """In a process in which this package, flax and the laboratory cannot be imported."""
    folder, model, tables, schema = exported("rankmixer")
    user, candidates = request(schema, 3, 5)
    flat = flattened(user)
    np.savez(tmp_path / "user.npz", **flat)
    flat = flattened(candidates)
    np.savez(tmp_path / "candidates.npz", **flat)
    program = tmp_path / "elsewhere.py"
    program.write_text("""
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    names = {"recscale", "flax", "ml_collections", "optax", "orbax", "pandas", "pyarrow", "grain", "matplotlib",
             "jaxtyping", "click", "lazy_loader", "rich", "wandb"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
folder, arrays = sys.argv[1:]
sys.path.insert(0, folder)
import numpy as np
from served import load

def read(name):
    tree = {"histories": {"clicks": {"dense": {}}}} if name == "user" else {}
    for key, value in np.load(f"{arrays}/{name}.npz").items():
        *parts, last = key.split("/")
        place = tree
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return tree

model = load(folder)
state = model.encode_user(model.lookup_user(read("user")))
np.save(f"{arrays}/logits.npy", model.score(state, model.lookup_candidates(read("candidates"))))
""")
    subprocess.run([sys.executable, str(program), str(folder), str(tmp_path)], check=True)
    wanted = logits_of(model, tables, schema, user, candidates)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5, rtol=1e-5)


def test_values_of_a_log_become_ids(exported, tmp_path):
    model, tables, schema = make("rankmixer")
    words = {"items": np.array(["beta", "alpha", "gamma"], object), "user": np.array([30, 10, 20])}
    export_model(model, tables, schema, tmp_path / "out", vocabularies=words | {"user/rows": np.arange(5)[::-1]})
    served = load(tmp_path / "out")
    assert served.manifest["vocabularies"] == ["items", "user"]
    assert served.ids("items", [["alpha", "gamma"], ["gammas", "beta"]]).tolist() == [[3, 4], [1, 2]]
    assert served.ids("user", [10, 99]).tolist() == [1, 3]  # ids 3 and 1, whose rows are 1 and 3
    with pytest.raises(ValueError, match="no vocabulary of table 'shops'"):
        served.ids("shops", ["a"])


def test_other_folders_are_left_alone(exported, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        export_model(*make("rankmixer"), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no exported model"):
        load(tmp_path)


@pytest.mark.slow
def test_the_model_that_a_run_left_is_exported_by_the_command(tmp_path):
    config = get_config("rankmixer", "known_truth")
    config.data.update(preset="smoke", holdout_rows=512)
    config.model.update(tokens=4, width=16, hidden=16, layers=1)
    config.training.update(requests=64, examples=64 * 40, warmup_examples=640)
    train(config, tmp_path / "run")
    result = CliRunner().invoke(export, [str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "rankmixer for cpu" in result.output
    model, _, schema = run_model(tmp_path / "run")
    served = load(tmp_path / "out")
    assert served.manifest["run_id"] and served.manifest["metrics"]["logloss"] > 0
    inputs = random_inputs(schema, 3, 5)
    user, candidates = inputs.user, inputs.candidates
    histories = {name: {part: array for part, array in vars(h).items() if array is not None}
                 for name, h in user.histories.items()}  # fmt: skip
    state = served.encode_user({"fields": user.fields, "histories": histories})
    wanted = model.score(model.encode_user(user), candidates).logits
    np.testing.assert_allclose(served.score(state, {"fields": candidates.fields}), wanted, atol=1e-5, rtol=1e-5)
