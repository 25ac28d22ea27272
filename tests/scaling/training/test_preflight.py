"""What cannot work is refused before any work is done, with the setting, its value and what it may be."""

import math
import re
import types

import pytest

from recscale import models
from recscale.models.inputs import Field, Schema, Task
from recscale.scaling import host_memory
from recscale.scaling.bench.fixed_batch import FixedBatch
from recscale.scaling.records.overrides import apply, parse
from recscale.scaling.training import get_config, group_id, preflight, run_id, train, wandb_mirror
from recscale.scaling.training.schedule import run_steps, warmup_steps


def config(*assignments, architecture="dlrm_mlp"):
    base = get_config(architecture)
    return apply(base, parse(base, ["training.requests=128", "training.examples=12800", *assignments]))


IMPOSSIBLE = {
    "training.lr": ["0", "-1e-3", "1e999"],
    "training.embedding_lr": ["-0.05", "1e999"],
    "training.value_lr": ["0", "-1.0"],
    "training.eps": ["0", "-1e-8"],
    "training.embedding_eps": ["0"],
    "training.embedding_init_std": ["0", "-0.1", "1e999"],
    "training.b1": ["1.0", "-0.1"],
    "training.b2": ["1.0", "2.0"],
    "training.weight_decay": ["-1e-2", "1e999"],
    "training.clip_norm": ["-1.0"],
    "training.value_clip_norm": ["-1.0"],
    "training.value_weight_decay": ["-1.0"],
    "training.decay_fraction": ["-0.1", "1.5"],
    "training.warmup_examples": ["-5"],
    "training.log_every_examples": ["-1"],
    "training.checkpoint_every_s": ["-1.0"],
    "training.examples": ["-1", "1", "127"],
    "training.requests": ["0", "-4"],
    "training.candidates": ["0"],
    "seed": ["-1", "4294967296"],
    "data.log_seed": ["-1"],
    "data.holdout_rows": ["0"],
    "data.history_length": ["-1"],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in IMPOSSIBLE.items() for value in values])
def test_a_number_outside_its_range_is_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key} is .*, expected "):
        preflight.check_settings(config(f"{key}={value}"))


@pytest.mark.parametrize("setting", ["balance_weight=-0.1", "norm_eps=0.0", "dropout=1.0", "dropout=-0.5"])
def test_a_number_of_the_model_outside_its_range_is_refused(setting):
    with pytest.raises(ValueError, match=rf"model.{setting.partition('=')[0]} is .*, expected "):
        preflight.check_settings(config(f"model.{setting}", architecture="rankmixer"))


def test_no_number_of_a_sweep_file_is_none():
    """On the command line `nan` is no value of a float."""
    asked = config(architecture="rankmixer")
    asked.training.lr = asked.model.dropout = math.nan
    with pytest.raises(
        ValueError, match="model.dropout is nan, .*training.lr is nan, expected a finite number above 0"
    ):
        preflight.check_settings(asked)


def test_all_that_is_wrong_is_told_at_once_and_what_is_right_passes():
    with pytest.raises(ValueError, match="seed is -1.*; training.lr is 0.0"):
        preflight.check_settings(config("seed=-1", "training.lr=0"))
    for name in models.list_models():
        preflight.check_settings(get_config(name))


def test_a_target_of_the_planner_is_refused_with_the_command_that_takes_it():
    with pytest.raises(ValueError, match="`recscale size dlrm_mlp --dense-params 100000 --schema known_truth:dense`"):
        preflight.check_settings(config("size.dense_params=1e5"))


@pytest.mark.parametrize("what", ["", "checkpoints", "cache", "model", "nowhere"])
def test_a_place_that_cannot_be_written_to_is_named_with_the_option_that_moves_it(tmp_path, what):
    """Where a file is, or a link to nothing, no folder can be; permissions do not hold back every user."""
    place = tmp_path / "run" / what
    place.parent.mkdir(parents=True, exist_ok=True)
    if what == "nowhere":
        place.symlink_to("/gone")
    else:
        place.touch()
    out = place if what == "nowhere" else tmp_path / "run"
    with pytest.raises(ValueError, match=f"{place} is none: choose another with --out"):
        train(config("data.preset=smoke"), out)


def test_nothing_is_written_for_a_run_that_is_refused(tmp_path):
    with pytest.raises(ValueError, match="training.lr is -0.1"):
        train(config("training.lr=-0.1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def source():
    fields = (Field("user", "user", 4, vocabulary=8), Field("item", "candidate", 4, vocabulary=8))
    return FixedBatch(Schema(fields, tasks=(Task("click"),)), 4)


@pytest.mark.parametrize(
    "architecture, settings",
    [
        ("rankmixer", ["model.tokens=7", "model.width=30"]),
        ("rankmixer", ["model.width=0"]),
        ("rankmixer", ["model.activation=nonsense"]),
        ("rankmixer", ["model.init=nonsense"]),
        ("autoint", ["model.heads=3"]),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(source, architecture, settings):
    with pytest.raises(ValueError, match=architecture):
        preflight.check_shape(config(*settings, architecture=architecture), source)


def test_a_model_that_builds_but_does_not_run_is_refused(source, monkeypatch):
    preflight.check_shape(config(), source)

    def trace(*_):
        raise TypeError("dot_general requires contracting dimensions to have the same shape\nand much more")

    monkeypatch.setattr(preflight, "trace_forward", trace)
    with pytest.raises(ValueError, match="dlrm_mlp cannot be built with these settings: dot_general .* shape$"):
        preflight.check_shape(config(), source)


def test_an_open_warm_up_is_a_twentieth_of_the_run_and_at_most_20000_rows():
    assert [warmup_steps(config(), 128, [steps]) * 128 for steps in (100, 3000, 100_000)] == [640, 19_200, 20_096]
    assert run_id(config()) == run_id(config("training.warmup_examples=640"))
    assert run_id(config()) != run_id(config("training.warmup_examples=641"))
    longer = config("training.examples=25600")
    assert group_id(longer) == group_id(config("training.warmup_examples=1280"))


def test_a_warm_up_that_leaves_no_run_is_refused_with_one_that_does():
    with pytest.raises(ValueError, match="more than 25% of a run of 12,800 rows") as told:
        warmup_steps(config("training.warmup_examples=12800"), 128, [100])
    [mend] = re.findall(r"set (training.warmup_examples=\d+)", str(told.value))
    assert warmup_steps(config(mend), 128, [100]) == 5
    with pytest.raises(ValueError, match="run of 12,800"):  # of several runs on one trunk the shortest decides
        warmup_steps(config("training.warmup_examples=12800"), 128, [10_000, 100])


def test_an_endless_log_is_never_trained_on_where_it_is_evaluated():
    endless = types.SimpleNamespace(requests=128, candidates=2, batches=None, total_rows=None)
    most = 2**32
    assert run_steps(config(f"training.examples={most}"), endless) == 2**24
    with pytest.raises(ValueError, match="evaluated on from number 2,147,483,648 on") as told:
        run_steps(config(f"training.examples={most + 1}"), endless)
    assert f"at most {most:,} rows" in str(told.value)


@pytest.mark.parametrize(
    "setting, why",
    [
        ("training.value_lr=2.0", "dlrm_mlp has no memory"),
        ("data.history_length=4", "the data has no history"),
        ("data.root=/somewhere", "the known-truth log has no files"),
        ("data.embedding_rows=100", "the known-truth log has tables of its own"),
        ("training.patience=5", "training.passes is 0"),
        ("training.decay_shape=sqrt training.schedule=cosine", "training.schedule is 'cosine'"),
        ("training.suffix_alpha=0.5", "the data has no history"),
        ("training.value_update=rows_sgd", "dlrm_mlp has no memory"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(source, setting, why):
    asked = config(*setting.split())
    counts = models.count("dlrm_mlp", source.schema, asked.model)
    found = preflight.without_effect(asked, source, counts, [setting.partition("=")[0], "training.lr"])
    with pytest.raises(ValueError, match=f"would be ignored: {why}"):
        preflight.refuse_without_effect(found)
    preflight.refuse_without_effect(preflight.without_effect(asked, source, counts, ["training.lr", "seed"]))


def test_a_state_that_fits_neither_memory_nor_disk_is_refused(tmp_path, monkeypatch):
    preflight.check_room(1000, tmp_path / "not" / "there")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2999))
    with pytest.raises(ValueError, match="take .* of disk, and .* free at .*--out"):
        preflight.check_room(1000, tmp_path)
    monkeypatch.setattr(host_memory, "free_bytes", lambda: 999)
    for state, batch in ((1000, 0), (100, 900)):
        with pytest.raises(ValueError, match="the state alone takes .* B of memory and a batch .* and 999 B are free"):
            preflight.check_room(state, tmp_path, batch)


def test_wandb_online_without_a_login_is_refused_and_asks_nobody(monkeypatch):
    def login(verify):
        assert not wandb_mirror.sys.stdin.isatty()
        raise RuntimeError("no tty")

    monkeypatch.setitem(wandb_mirror.sys.modules, "wandb", types.SimpleNamespace(login=login))
    wandb_mirror._has_login.cache_clear()
    with pytest.raises(ValueError, match="wandb has no login: run `wandb login`, .*tracking.wandb=offline"):
        preflight.check_settings(config("tracking.wandb=online"))
    preflight.check_settings(config("tracking.wandb=offline"))
    wandb_mirror._has_login.cache_clear()
