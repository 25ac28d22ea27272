"""Passes, mirrors, commands of models, options of a step and progress, each with the rest replaced."""

import dataclasses
import json
import sys
import types
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from recscale.scaling.training import get_config, model_commands, model_files, predicting, progress, step_options
from recscale.scaling.training import wandb_mirror as mirrors
from recscale.scaling.training.passes import PassesLoop
from recscale.scaling.training.replicas import finite, per_replica
from recscale.scaling.training.schedule import Segment


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    weights: jax.Array


def passed(losses, restored=None, best=None):
    """What a finite log of 10 batches a pass does when validation says these losses."""
    done, losses = [], iter(losses)
    made, whole = object.__new__(PassesLoop), Segment(0, 90, 90)
    training = types.SimpleNamespace(patience=1, passes=9, decay_fraction=0.5)
    made.config, made.source = types.SimpleNamespace(training=training), types.SimpleNamespace(batches_per_pass=10)
    made.schedule = types.SimpleNamespace(segments=[whole], members={whole: "members"})
    made.ledger = types.SimpleNamespace(begin=lambda schedule, mesh: done.append(("begin", mesh)))
    made.trainer = types.SimpleNamespace(mesh="mesh", settled=lambda state: state)
    made.checkpoints = types.SimpleNamespace(close=lambda: done.append(("close",)))
    state = State(jnp.int32(0), jnp.zeros(1))
    made._restore = lambda: (restored or {"step": 0}, state, best, "begun")

    @jax.transfer_guard("allow")
    def segment(index, part, start, state, best, interval):
        assert made.schedule.members[part] == "members" and index == 0
        done.append(("train", part, start, float(state.weights[0]), interval))
        return State(state.step + part.stop - start, state.weights + 1)

    def validate(state, best):
        made.tracker.losses.append([next(losses)])
        return state if best is None or made.tracker.best[0] == made.tracker.done - 1 else best

    made._enter = lambda state, segment: done.append(("enter", segment)) or state
    made._segment, made._validate = segment, validate
    made._save = lambda index, step, state, best, interval: done.append(("save", index, step, interval))
    made._finish_passes = lambda *given: done.append(given)
    made.run()
    whole, state, best, per_pass = done[-2]
    done[-2] = ("finish", whole, int(state.step), float(state.weights[0]), float(best.weights[0]), per_pass)
    return done


def test_passes_end_with_a_decay_from_the_best_state():
    done = passed([0.5, 0.4, 0.3, 0.31, 0.2, 0.25])
    steady, decay = Segment(0, 0), Segment(40, 60, 90)
    assert [each[1] for each in done if each[0] == "enter"] == [steady] * 4 + [decay] * 2
    trained = [each[1:] for each in done if each[0] == "train"]
    assert [start for _, start, *_ in trained] == [0, 10, 20, 30, 40, 50]
    assert [part for part, *_ in trained] == [Segment(n, n + 10, 90 if n >= 40 else None) for n in range(0, 60, 10)]
    assert [weights for *_, weights, _ in trained] == [0, 1, 2, 3, 3, 4]  # the decay leaves from the third pass
    assert [interval for *_, interval in trained] == ["begun", *[[]] * 5]
    assert [each for each in done if each[0] == "save"] == [("save", 0, n, []) for n in range(10, 70, 10)]
    assert done[0] == ("begin", "mesh") and done[-2:] == [("finish", Segment(0, 90, 90), 60, 5.0, 4.0, 10), ("close",)]


def test_passes_go_on_from_a_checkpoint():
    position = {"step": 43, "passes": {"losses": [[0.5], [0.4], [0.3], [0.31]], "decay": 4}}
    best = State(jnp.int32(30), jnp.full(1, 7.0))
    done = passed([0.32, 0.33], position, best)
    assert [each[1:3] for each in done if each[0] == "train"] == [
        (Segment(43, 50, 90), 43), (Segment(50, 60, 90), 50),
    ]  # fmt: skip
    assert done[-2][4] == 7.0


def test_replicas_are_written_where_their_gradients_are_finite():
    grads = {"a": jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [1.0, 1.0]]), "b": jnp.array([1.0, 1.0, jnp.inf])}
    assert finite(grads).tolist() == [True, False, False]
    found = per_replica(jnp.array([True, False]), jnp.array([0.5, 2.0]), jnp.array([[4.0, 6.0], [jnp.nan, 1.0]]))
    assert found.tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_a_step_is_compiled_with_what_the_section_says(monkeypatch):
    t, asked = get_config("dlrm_mlp").training, []
    named = dict(b1=0.5, b2=0.6, eps=1e-3, weight_decay=0.1, clip_norm=2.0)
    for name, value in named.items():
        t[name] = value
    t.embedding_lr, t.embedding_eps, t.embedding_init_std, t.embedding_l2 = 0.2, 0.3, 0.4, 0.5
    t.optimizer, t.embedding_optimizer, t.decay_shape, t.remat, t.accumulate = "adam", "rowwise_adam", "sqrt", "dots", 4
    monkeypatch.setattr(step_options.optimizers, "dense_optimizer", lambda name, **more: asked.append((name, more)))
    monkeypatch.setattr(step_options.memory_rows, "value_options", lambda t, rows: ("values", rows))
    found = step_options.step_options(t, 64, 7)
    assert asked == [("adam", named)] and found.values == ("values", 64) and found.warmup == 7
    assert (found.embedding_rate, found.embedding_eps, found.embedding_init_std, found.embedding_l2) == (
        0.2, 0.3, 0.4, 0.5,
    )  # fmt: skip
    assert (found.embedding_optimizer, found.decay_shape, found.remat, found.accumulate, found.suffix) == (
        "rowwise_adam", "sqrt", "dots", 4, None,
    )  # fmt: skip
    t.schedule, t.suffix_alpha, t.suffix_beta = "cosine", 0.25, 0.5
    found = step_options.step_options(t, 64, 7)
    assert found.decay_shape == "cosine" and found.suffix == (0.25, 0.5)
    for alpha, beta in ((0.0, 0.5), (0.5, 0.0), (-0.5, -0.5), (-0.5, 0.0)):
        t.suffix_alpha, t.suffix_beta = alpha, beta
        with pytest.raises(ValueError, match="set both above 0, or both 0"):
            step_options.step_options(t, 64, 7)
    t.suffix_alpha = t.suffix_beta = 0.0
    for name in ("embedding_optimizer", "decay_shape", "remat"):
        kept, t[name], t.schedule = t[name], "other", "wsd"
        with pytest.raises(ValueError, match=f"training.{name} is 'other'"):
            step_options.step_options(t, 64, 7)
        t[name] = kept
    with t.unlocked():
        del t.remat, t.accumulate  # of earlier versions
    found = step_options.step_options(t, 64, 7)
    assert (found.remat, found.accumulate) == ("none", 1) and step_options.StepOptions.accumulate == 1


def test_progress_in_words(monkeypatch):
    assert [progress.clock(s) for s in (0.4, 59.4, 59.6, 60, 3599, 3600, 7500)] == [
        "0 s", "59 s", "1 min 00 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    event = {"rows_per_s": 12_300.0, "flops_per_s": 1.2e9, "eta_s": 42.0}
    assert progress.speed(event) == "12,300 rows/s, 1.20 GFLOP/s, 42 s left" and progress.speed({}) == ""
    assert progress.speed(event | {"rows_per_s": None, "flops_per_s": None}) == "42 s left"
    assert progress.speed(event | {"eta_s": None}) == "12,300 rows/s, 1.20 GFLOP/s"
    shown = []

    class Bar:
        def __init__(self, *columns):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            shown.append("over")

        def add_task(self, title, **more):
            shown.append((title, more))
            return 5

        def update(self, task, **more):
            shown.append((task, more))

    monkeypatch.setattr(progress, "Progress", Bar)
    with progress.bar("din") as update:
        update(event | {"step": 3, "total_steps": 9})
    started, told, over = shown
    assert started == ("din", {"total": None, "text": "compiling"}) and over == "over"
    assert told == (5, {"total": 9, "completed": 3, "text": progress.speed(event)})


def test_a_mirror_never_asks_and_never_prints(monkeypatch, tmp_path, caplog):
    asked, terminal = [], sys.stdin

    def init(**options):
        asked.append((options, sys.stdin.read()))
        return types.SimpleNamespace()

    def login(verify):
        if sys.stdin is terminal or verify:
            raise AssertionError("it would ask")
        return answer

    fake = types.SimpleNamespace(init=init, login=login, Settings=lambda **options: options)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for answer in (False, True):
        mirrors._has_login.cache_clear()
        mirrors.WandbMirror("online", "laws", "abc", tmp_path, {"seed": 1})
        assert len(asked) == answer and ("there is no login" in caplog.text)
        if answer:
            mirrors.require_login()
        else:
            with pytest.raises(ValueError, match="wandb has no login"):
                mirrors.require_login()
    assert sys.stdin is terminal and asked[0] == ({
        "project": "laws", "id": "abc", "resume": "allow", "dir": str(tmp_path), "mode": "online",
        "config": {"seed": 1}, "reinit": "create_new", "settings": {"silent": True, "console": "off"},
    }, "")  # fmt: skip
    mirrors._has_login.cache_clear()
    monkeypatch.setattr(fake, "login", lambda verify: 1 / 0)
    assert mirrors._has_login() is False
    mirrors._has_login.cache_clear()


def test_commands_of_models_read_a_folder_and_print_what_they_find(monkeypatch, tmp_path):
    asked = []
    metrics = {"logloss": 0.5, "valid_logloss": 0.25, "valid_by_day": [1], "auc": 0.123456789, "names": "x"}
    trainer = types.SimpleNamespace(holdout_logits=lambda state: np.array([[1.0], [2.0]]))
    source = types.SimpleNamespace(evaluate=lambda logits: asked.append(logits.tolist()) or metrics)

    def restore(run, root):
        asked.append((run, root))
        return trainer, "state", source

    monkeypatch.setattr(model_files, "restore_model", restore)
    done = CliRunner().invoke(model_commands.evaluate, [str(tmp_path), "--data", "/log", "--json"])
    assert asked == [(Path(tmp_path), "/log"), [1.0]] and done.exit_code == 0
    lines = done.output.splitlines()
    assert [line.split() for line in lines[:-1]] == [["logloss", "0.5"], ["auc", "0.123457"]]
    assert json.loads(lines[-1]) == {"logloss": 0.5, "auc": 0.123456789, "names": "x"}
    done = CliRunner().invoke(model_commands.evaluate, [str(tmp_path), "--split", "valid"])
    assert [line.split() for line in done.output.splitlines()] == [["logloss", "0.25"]]
    (tmp_path / "rows.csv").touch()

    def score(*given):
        asked.append(given)
        return 1234, "2 rows left out"

    monkeypatch.setattr(predicting, "predict_file", score)
    rows, out = tmp_path / "rows.csv", tmp_path / "scores.parquet"
    arguments = [str(tmp_path), "--data", str(rows), "--out", str(out), "--log", "/log"]
    done = CliRunner().invoke(model_commands.predict, arguments)
    assert done.output == f"2 rows left out\n1,234 rows scored in {out}\n" and asked[-1] == (
        tmp_path,
        rows,
        out,
        "/log",
    )
    for wrong in (["nowhere"], [str(rows)], [str(tmp_path), "--split", "train"]):
        assert CliRunner().invoke(model_commands.evaluate, wrong).exit_code == 2
    for left_out in (arguments[:3], arguments[:1] + arguments[3:], [*arguments[:2], str(tmp_path), *arguments[3:]],
                     [*arguments[:4], str(tmp_path)]):  # fmt: skip
        assert CliRunner().invoke(model_commands.predict, left_out).exit_code == 2
    for command in (model_commands.evaluate, model_commands.predict):
        assert all(option.help for option in command.params if isinstance(option, click.Option))
    shown = CliRunner().invoke(model_commands.evaluate, ["--help"]).output
    assert "[default: test]" in shown and "[OPTIONS] RUN" in shown
