"""Both sides of every refusal before any work is done: what is just allowed passes, its neighbour is told."""

import math
import types

import jax
import numpy as np
import pytest

from recscale.models.inputs import Field, Schema, Task
from recscale.scaling.training import get_config, preflight


def config(architecture="dlrm_mlp", /, **settings):
    made = get_config(architecture)
    made.training.requests, made.training.examples = 8, 80
    made.update_from_flattened_dict({key.replace("__", "."): value for key, value in settings.items()})
    return made


def wrong(made):
    """What is said to be wrong with a configuration, one text each; none if it passes."""
    try:
        preflight.check_settings(made)
    except ValueError as error:
        return str(error).split("; ")
    return []


POSITIVE = ((5e-324, 0.5, 1e300), (0.0, -0.5, math.inf, math.nan))
NOT_NEGATIVE = ((0.0, 0.5, 1e300), (-5e-324, math.inf, math.nan))
BELOW_ONE = ((0.0, 0.5, 0.999), (-1e-9, 1.0, 1.5))
SHARE = ((0.0, 0.5, 1.0), (-1e-9, 1.001))
SIDES = {
    "seed": ((0, 1, 2**32 - 1), (-1, 2**32)), "data.holdout_rows": ((1, 2), (0, -1)),
    "training.lr": POSITIVE, "training.weight_decay": NOT_NEGATIVE, "training.b1": BELOW_ONE,
    "training.decay_fraction": SHARE, "tracking.watts_per_device": ((-1.0, 0.0, 1e300), (math.inf, math.nan)),
    "model.dropout": BELOW_ONE, "model.norm_eps": POSITIVE, "model.balance_weight": NOT_NEGATIVE,
    "training.checkpoint_every_s": NOT_NEGATIVE,
}  # fmt: skip


@pytest.mark.parametrize("key", SIDES)
def test_a_number_is_refused_from_its_limit_on(key):
    fits, fails = SIDES[key]
    for value in fits:
        assert wrong(config("rankmixer", **{key: value})) == [], value
    for value in fails:
        [told] = wrong(config("rankmixer", **{key: value}))
        assert told.startswith(f"{key} is {value!r}, expected "), value


def test_a_run_is_a_batch_at_least_in_parts_that_divide_its_requests():
    for requests, candidates, examples, fits in (
        (4, 2, 8, True),
        (4, 2, 7, False),
        (4, 2, 1, False),
        (4, 2, 0, True),
        (1, 1, 1, True),
    ):
        asked = {"training.requests": requests, "training.candidates": candidates, "training.examples": examples}
        assert (wrong(config(**asked)) == []) is fits, asked
    told = "training.examples is 7, expected at least one batch of 8 rows"
    assert wrong(config(**{"training.requests": 4, "training.candidates": 2, "training.examples": 7})) == [told]
    for parts, fits in ((1, True), (2, True), (8, True), (3, False), (16, False)):
        assert (wrong(config(training__accumulate=parts)) == []) is fits, parts
    assert wrong(config(training__accumulate=3))[0].startswith("training.accumulate is 3, expected a number that")
    for parts in (0, -3):
        assert wrong(config(training__accumulate=parts)) == [f"training.accumulate is {parts}, expected at least 1"]
    odd = config(**{"training.requests": 3, "training.examples": 3})
    with odd.training.unlocked():
        del odd.training.accumulate  # of an earlier version
    assert wrong(odd) == []


def test_every_part_of_a_batch_divides_over_the_devices():
    for mesh, parts, fits in (
        ("data=8", 1, True), ("data=4", 2, True), ("data=8", 2, False), ("data=16", 1, False), ("data=3", 1, False),
        ("data=16", 2, False), ("data=8", 0, False), ("nowhere=2", 1, False),
    ):  # fmt: skip
        told = wrong(config(training__mesh=mesh, training__accumulate=parts))
        assert (told == []) is fits and (fits or parts == 0 or told[0].startswith("training.mesh: ")), (mesh, parts)


@pytest.mark.parametrize(
    "target, data, asked",
    [
        ("dense_params", "known_truth", "--dense-params 100000 --schema known_truth:dense"),
        ("train_flops", "known_truth", "--train-flops 100000 --schema known_truth:dense"),
        ("budget_flops", "known_truth", "--train-flops 100000 --examples 80 --schema known_truth:dense"),
        ("dense_params", "stored", "--dense-params 100000"),
    ],
)
def test_the_command_that_finds_a_shape_is_told(target, data, asked):
    made = get_config("dlrm_mlp", data)
    made.training.requests, made.training.examples, made.size[target] = 8, 80, 1e5
    told = "; ".join(wrong(made))
    assert told.startswith(f"size.{target} is 100000, ") and told.endswith(f"`recscale size dlrm_mlp {asked}`")


def test_the_tokens_of_a_hash_table_are_left_as_they_are():
    for architecture in ("pkm", "hash_table"):
        made = config(architecture)
        model = made.model
        kept = {"model.tokenizer": "identity", "model.norm": "none", "model.layers": 1, "training.embedding_lr": 0.0}
        needed = kept | {"training.embedding_lr": 0}
        made.update_from_flattened_dict(kept)
        assert wrong(made) == []
        for key, value in {"model.norm": "layer", "model.layers": 2, "training.embedding_lr": 0.5}.items():
            made.update_from_flattened_dict({key: value})
            told = wrong(made)
            if architecture == "pkm":
                assert told == []
            else:
                assert len(told) == 1 and told[0].startswith(f"{key} is {value!r}, ")
                assert told[0].endswith(f"set {key} to {needed[key]!r}")
            made.update_from_flattened_dict({key: kept[key]})
        model.norm = ""
        assert wrong(made) == []


def test_a_login_is_asked_for_only_where_it_is_needed(monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "require_login", lambda: asked.append(1))
    for mode in ("off", "offline", "online"):
        assert wrong(config(tracking__wandb=mode)) == [] and len(asked) == (mode == "online")


def test_some_row_is_held_out_to_evaluate_on():
    made = config()

    def check(facts, rows=(1,), on_device=False):
        given = {"on_device": on_device, "facts": lambda: facts, "holdout": lambda: rows}
        preflight.check_holdout(made, types.SimpleNamespace(**given))

    for facts in ({}, {"holdout_requests": {"test": 1}}, {"holdout_requests": {"valid": 0}}):
        check(facts)
        with pytest.raises(ValueError, match="has no held-out row"):
            check(facts, rows=())
        check(facts, rows=(), on_device=True)
    with pytest.raises(ValueError, match="'known_truth' has no held-out row .*'test': 0"):
        check({"holdout_requests": {"test": 0, "valid": 3}})


def test_a_folder_is_one_that_can_be_written_to(tmp_path, monkeypatch):
    asked, allowed = [], set()

    def access(place, mode):
        asked.append((place, mode))
        return mode in allowed

    monkeypatch.setattr(preflight.os, "access", access)
    allowed.add(preflight.os.W_OK | preflight.os.X_OK)
    preflight.check_places()
    preflight.check_places(tmp_path, tmp_path / "not" / "there")
    assert [place for place, _ in asked] == [tmp_path, tmp_path]
    allowed.clear()
    with pytest.raises(ValueError, match="choose another with --out"):
        preflight.check_places(tmp_path)
    allowed |= {mode for _, mode in asked}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}/file/run must be .*, and {tmp_path}/file is none"):
        preflight.check_places(tmp_path, tmp_path / "file" / "run")


def test_bytes_of_a_state_and_of_a_batch():
    def leaf(*shape, dtype=np.float32, part=None):
        split = types.SimpleNamespace(shard_shape=lambda whole: part or whole)
        return types.SimpleNamespace(shape=shape, dtype=np.dtype(dtype), sharding=split)

    tree = {"a": leaf(4, 6, part=(2, 6)), "b": leaf(5, dtype=np.int8), "c": leaf(dtype=np.float64)}
    assert preflight.state_bytes(tree) == 4 * 24 + 5 + 8 and preflight.device_bytes(tree) == 4 * 12 + 5 + 8
    mesh = types.SimpleNamespace(local_devices=[0, 1, 2])
    assert preflight.state_bytes(tree, mesh) == 3 * 61 and preflight.state_bytes({}) == 0
    assert preflight.state_bytes({"a": jax.ShapeDtypeStruct((3, 2), np.float32)}) == 24
    schema = types.SimpleNamespace(
        candidate_fields=[types.SimpleNamespace(width=3), types.SimpleNamespace(width=4)], width=12,
        sequences=[types.SimpleNamespace(length=10, width=2), types.SimpleNamespace(length=5, width=3)],
    )  # fmt: skip
    source = types.SimpleNamespace(schema=schema, requests=6, candidates=2)
    assert preflight.batch_bytes(source) == 4 * 6 * (5 + 35 + 2 * 7)


def test_a_state_fits_as_long_as_memory_and_disk_hold_it(tmp_path, monkeypatch):
    free, disk, asked = [1000], [3000], []

    def disk_usage(path):
        asked.append(path)
        return types.SimpleNamespace(free=disk[0])

    monkeypatch.setattr(preflight.host_memory, "free_bytes", lambda: free[0])
    monkeypatch.setattr(preflight.shutil, "disk_usage", disk_usage)
    preflight.check_room(1000, tmp_path / "not" / "there")
    preflight.check_room(900, tmp_path, 100)
    assert asked == [tmp_path, tmp_path]
    for needed, batch in ((1001, 0), (900, 101)):
        with pytest.raises(ValueError, match="a batch .* B are free: train fewer"):
            preflight.check_room(needed, tmp_path, batch)
    disk[0] = 2999
    preflight.check_room(999, tmp_path)
    with pytest.raises(ValueError, match=f"are free at {tmp_path}: free some"):
        preflight.check_room(1000, tmp_path)
    monkeypatch.setattr(preflight.jax, "default_backend", lambda: "gpu")  # whose memory is its own
    free[0] = 0
    preflight.check_room(999, tmp_path)
    with pytest.raises(ValueError, match="checkpoints take"):
        preflight.check_room(1000, tmp_path)


# Of a run on a log with ids and histories, by a model with a memory, every setting counts but those that others switch
# off: (settings, those of them that are then without effect).
SWITCHED = [
    ({}, {"data.root", "data.embedding_width", "data.embedding_rows", "training.patience", "training.suffix_beta",
          "training.value_lr_decay_examples"}),
    ({"data.name": "mine"}, {"data.preset", "data.log_seed", "training.patience", "training.suffix_beta",
                             "training.value_lr_decay_examples"}),
    ({"data.name": "mine", "data.order": "shuffle", "training.suffix_alpha": 0.5, "training.passes": 2,
      "training.value_lr_rule": "linear"}, {"data.preset", "training.examples"}),
]  # fmt: skip
LISTED = (
    "data.root", "data.preset", "data.log_seed", "data.history_length", "training.b1", "training.b2",
    "training.decay_fraction", "training.decay_shape", "training.examples", "training.patience",
    "training.suffix_alpha", "training.suffix_beta", "training.value_lr_decay_examples", "data.embedding_width",
    "data.embedding_rows", "training.embedding_lr", "training.embedding_l2", "training.value_lr", "training.lr", "seed",
)  # fmt: skip


def without_effect(settings, keys=LISTED, ids=True, histories=True, memory=1):
    schema = types.SimpleNamespace(sequences=("s",) * histories, tables=lambda: {"t": (1, 1)} if ids else {})
    source, counts = types.SimpleNamespace(schema=schema), types.SimpleNamespace(memory_params=memory)
    return preflight.without_effect(config(**settings), source, counts, keys)


@pytest.mark.parametrize("settings, expected", SWITCHED)
def test_settings_that_others_switch_off(settings, expected):
    assert set(without_effect(settings)) == expected
    assert without_effect(settings, ["training.lr", "seed", "unknown"]) == {}


def test_settings_that_the_data_or_the_model_have_no_place_for():
    plain = set(without_effect({"training.suffix_alpha": 0.5}))
    found = without_effect({"training.suffix_alpha": 0.5}, histories=False)
    more = set(found) - plain
    assert more == {"data.history_length", "training.suffix_alpha", "training.suffix_beta"}
    assert found["data.history_length"] == found["training.suffix_alpha"] == "the data has no history"
    found = without_effect({"training.suffix_alpha": 0.5}, ids=False)
    assert set(found) - plain == {"training.embedding_lr", "training.embedding_l2"}
    assert found["training.embedding_lr"] == "the data has no ids"
    found = without_effect({"training.suffix_alpha": 0.5}, memory=0)
    assert set(found) - plain == {"training.value_lr"} and found["training.value_lr"] == "dlrm_mlp has no memory"
    assert found["training.value_lr_decay_examples"] == "dlrm_mlp has no memory"
    assert found["training.patience"] == "training.passes is 0"


@pytest.mark.parametrize("passes", [0, 2])
def test_settings_of_optimisers_and_schedules(passes):
    def ignored(key, **settings):
        return key in without_effect({f"training.{name}": value for name, value in settings.items()}, [key])

    optimisers = ("adamw", "adam", "rmsprop", "adagrad")
    assert [ignored("training.b1", optimizer=name) for name in optimisers] == [False, False, True, True]
    assert [ignored("training.b2", optimizer=name) for name in optimisers] == [False, False, False, True]
    schedules = ("wsd", "cosine", "constant")
    found = [ignored("training.decay_fraction", schedule=name, passes=passes) for name in schedules]
    assert found == ([False, False, False] if passes else [False, True, True])
    found = [ignored("training.decay_shape", schedule=name, passes=passes) for name in schedules]
    assert found == ([False, True, False] if passes else [False, True, True])


def test_what_would_be_ignored_is_named_with_its_reason():
    preflight.refuse_without_effect({})
    with pytest.raises(ValueError, match="^a would be ignored: x; b would be ignored: y. Leave it out$"):
        preflight.refuse_without_effect({"a": "x", "b": "y"})


def test_a_shape_is_traced_as_it_will_be_trained(monkeypatch):
    asked, made = [], config()
    schema = Schema((Field("item", "candidate", 4, vocabulary=8),), tasks=(Task("click"),))
    source = types.SimpleNamespace(schema=schema, requests=5, candidates=3)
    monkeypatch.setattr(preflight, "trace_forward", lambda *given: asked.append(given))
    preflight.check_shape(made, source)
    assert asked == [("dlrm_mlp", schema, made.model, 5, 3)]

    def silent(*given):
        raise RuntimeError

    monkeypatch.setattr(preflight, "trace_forward", silent)
    with pytest.raises(ValueError, match="with these settings: RuntimeError$"):
        preflight.check_shape(made, source)
