"""Views, truth, summary, page and command: every run accounted for, every number with its interval or its refusal."""

import html
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

from recscale.scaling.data.known_truth.config import preset
from recscale.scaling.laws import fit
from recscale.scaling.laws.fit_command import fit as fit_command
from recscale.scaling.laws.forms import registry
from recscale.scaling.laws.tables.axes import parse_axes
from recscale.scaling.records import runs
from recscale.scaling.records.number_text import amount, value_text
from recscale.scaling.report import captions, estimands, truth, views
from recscale.scaling.report.plot_command import plot
from recscale.scaling.report.report import make_report, print_summary
from recscale.scaling.report.report_command import report as page_command
from recscale.scaling.report.wording import shortened

FAST = dict(bootstrap=60)
TRUE = {"dcnv2": (0.030, 0.55), "rankmixer": (0.024, 0.75)}


@pytest.fixture(scope="module")
def out(make_runs, tmp_path_factory):
    """A sweep folder whose laws are steep enough that no floor is refused, with one diverged run."""
    folder = tmp_path_factory.mktemp("sweep")
    make_runs(TRUE, noise=3e-5, floor=0.434).to_parquet(folder / "runs.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def summary(out):
    return make_report(out, axes="dense_params", **FAST)


@pytest.fixture(scope="module")
def page(summary):
    with open(summary["paths"]["page"], encoding="utf-8") as handle:
        return handle.read()


# Views


def roles(table, **options):
    (view,) = views.make_views(table, bootstrap=0, profile=False, **options)
    return {s.architecture: s.frame["role"].value_counts().to_dict() for s in view.series}, view


def test_every_run_has_one_role(make_runs):
    table = make_runs()
    counted, view = roles(table, axes=["dense_params"])
    assert counted["rankmixer"] == {"fitted": 18, "held out": 2, "diverged": 1}
    assert sum(sum(own.values()) for own in counted.values()) == len(table)
    fitted = {run for s in view.series for run in s.fit.rows.run_ids}
    assert fitted == {run for s in view.series for run in s.rows("fitted")["run_id"]}


def test_the_largest_size_is_fitted_only_if_asked(make_runs):
    _, held = roles(make_runs(), axes=["dense_params"])
    counted, kept = roles(make_runs(), axes=["dense_params"], hold_out_largest=False)
    assert "held out" not in counted["rankmixer"]
    assert kept.series[0].span[1] > held.series[0].span[1]
    assert kept.series[0].prediction() is None


def test_passes_that_validation_ends_are_no_axis(make_runs):
    table = make_runs(seeds=2, diverged=False)
    epochs = 1 + table["seed"].rank(method="dense").astype(int)
    table = table.assign(protocol="passes", unique_examples=1_000, examples=1_000 * epochs, epochs=epochs)
    counted, _ = roles(table, axes=["dense_params"])
    assert "other examples" in counted["rankmixer"]
    counted, view = roles(views.with_rows_of_a_pass(table), axes=["dense_params"])
    assert set(counted["rankmixer"]) == {"fitted", "held out"}
    assert f"{amount(1000.0)} training examples" in view.series[0].slice


def test_a_freely_varying_second_axis_is_held_fixed(make_runs):
    table = make_runs(examples=(1e5, 1e6), data_term=(0.006, 0.3), seeds=1, diverged=False)
    counted, view = roles(table, axes=["dense_params"])
    assert counted["rankmixer"] == {"fitted": 6, "held out": 1, "other examples": 7}
    assert set(view.series[0].rows("fitted")["examples"]) == {1_000_000}
    assert "1M training examples" in view.series[0].slice


def test_examples_that_follow_size_are_not_sliced(make_runs):
    table = make_runs(seeds=1, diverged=False).assign(examples=lambda t: 20 * t["dense_params"])
    counted, view = roles(table, axes=["dense_params"])
    assert counted["rankmixer"] == {"fitted": 6, "held out": 1}
    assert "vary with it" in view.series[0].slice


def test_training_flops_of_a_grid_are_fitted_on_the_frontier(make_runs):
    table = make_runs({"rankmixer": (0.02, 0.4)}, examples=(1e5, 1e6, 1e7), data_term=(0.02, 0.4), seeds=2,
                      diverged=False)  # fmt: skip
    counted, view = roles(table, axes=["train_flops"])
    series = view.series[0]
    frontier = series.rows("fitted", "held out").groupby("train_flops")["logloss"].mean()
    assert (np.diff(frontier.to_numpy()) < 0).all()
    assert counted["rankmixer"]["off the frontier"] > 0
    assert series.rows("held out")["train_flops"].min() > series.rows("fitted")["train_flops"].max()
    assert "frontier" in view.notes[0]


def test_examples_are_clustered_by_trunk(make_runs):
    table = make_runs(sizes=(1e4,), examples=np.geomspace(1e5, 1e7, 8), data_term=(0.02, 0.4), diverged=False)
    _, view = roles(table, axes=["examples"])
    assert view.series[0].fit.rows.cluster == "trunk_id"
    assert roles(table.drop(columns="trunk_id"), axes=["examples"])[1].series[0].fit.rows.cluster == "run_id"


def test_terminal_figure_and_page_have_the_same_defaults_and_numbers(out, tmp_path):
    table = pd.read_parquet(out / "runs.parquet").query("architecture == 'rankmixer' and status == 'done'")
    table.to_parquet(tmp_path / "runs.parquet", index=False)
    arguments = [str(tmp_path), "--axes", "dense_params", "--bootstrap", "20", "--json"]
    done = CliRunner().invoke(fit_command, arguments)
    told = json.loads(done.output.splitlines()[-1])
    (view,) = views.make_views(table, axes=["dense_params"], hold_out_largest=False, bootstrap=20)
    drawn = view.series[0].fit
    assert told["params"]["alpha"] == drawn.params["alpha"] and told["params"]["E"] == drawn.params["E"]
    assert told["intervals"]["alpha"] == pytest.approx(list(drawn.intervals["alpha"]), rel=1e-12)
    commands = {c.name: {option.name: option for option in c.params} for c in (fit_command, plot, page_command)}
    for name in ("bootstrap", "cluster", "target"):
        assert len({(o.default, o.help) for own in commands.values() if (o := own.get(name))}) == 1
    assert registry.usual(["dense_params"]) == commands["plot"]["form"].default == commands["report"]["form"].default
    trunks = table.assign(examples=table.dense_params, trunk_id=table.run_id)
    assert fit(trunks, axes="examples", bootstrap=0, profile=False).rows.cluster == "trunk_id"


def test_of_several_rates_the_best_mean_is_kept_and_said(make_runs):
    counted, view = roles(make_runs(rates=(3e-3, 1e-3, 1e-2), diverged=False), axes=["dense_params"])
    assert counted["rankmixer"] == {"fitted": 18, "held out": 3, "other rate": 42}
    assert set(view.series[1].rows("fitted", "held out")["lr_dense"]) == {3e-3}
    assert any("3 learning rates per size" in note for note in view.notes)


def test_a_table_from_elsewhere_needs_no_status_architecture_or_shape():
    x = np.geomspace(1e3, 1e6, 9)
    table = pd.DataFrame({"dense_params": x, "logloss": 0.5 + 2 * x**-0.4})
    _, view = roles(table, axes=["dense_params"])
    assert view.series[0].exponent().value == pytest.approx(0.4, rel=1e-3)


def test_wrong_columns_and_forms_are_named(make_runs):
    table = make_runs()
    with pytest.raises(ValueError, match="no column 'loglos'.*did you mean .logloss"):
        views.make_views(table, target="loglos")
    with pytest.raises(ValueError, match="did you mean .dense_params"):
        views.make_views(table, axes=["dense_param"])
    with pytest.raises(ValueError, match="chinchilla has 2 axes"):
        views.make_views(table, form="chinchilla")
    with pytest.raises(ValueError, match="no axis to fit or plot"):
        views.make_views(table[table["dense_params"] == table["dense_params"].iloc[0]])


def test_the_prediction_is_the_law_of_the_smaller_sizes(make_runs):
    table = make_runs(TRUE, noise=3e-5, floor=0.434, diverged=False)
    (view,) = views.make_views(table, axes=["dense_params"], **FAST)
    for series in view.series:
        prediction = series.prediction()
        own = fit(series.rows("fitted"), "power_offset", {"x": "dense_params"}, bootstrap=0, profile=False)
        assert prediction.predicted == pytest.approx(own.predict({"x": prediction.x}), rel=1e-9)
        assert prediction.error == pytest.approx(prediction.predicted - prediction.measured)
        assert prediction.interval[0] < prediction.predicted < prediction.interval[1]
        assert prediction.inside == (prediction.interval[0] <= prediction.measured <= prediction.interval[1])
        assert prediction.ratio == pytest.approx(7.4e5 / 2.69e5, rel=0.01)
        assert abs(prediction.error) < abs(prediction.last_value)


# Truth


def test_truth_is_read_from_columns_and_the_preset(make_runs):
    found = truth.find(make_runs())
    assert (found.asymptote, found.entropy_floor, found.alpha) == (0.4255, 0.4329, 0.35)
    assert found.exponents["examples"] == pytest.approx(0.35 / 1.35)
    assert "run table" in found.source and not found.notes


def test_truth_in_the_records_beats_the_preset(make_runs, tmp_path):
    data = {"name": "known_truth", "preset": "dense_nested", "overrides": {"alpha": 0.5, "order_shares": [0.2, 0.8]}}
    runs.write_record(tmp_path / "runs" / "a", {"status": "done", "run_id": "a", "config": {"data": data}})
    found = truth.find(make_runs(), tmp_path)
    assert found.alpha == 0.5 and "records" in found.source


def test_logs_that_differ_have_no_common_truth(make_runs, tmp_path):
    table = make_runs()
    table.loc[0, "asymptote"] = 0.5
    for name, alpha in (("a", 0.3), ("b", 0.4)):
        data = {"name": "known_truth", "preset": "dense_nested", "overrides": {"alpha": alpha}}
        runs.write_record(tmp_path / "runs" / name, {"status": "done", "run_id": name, "config": {"data": data}})
    found = truth.find(table, tmp_path)
    assert found.asymptote is None and found.alpha is None and len(found.notes) == 2
    assert "dense_params, examples" in found.notes[1]


def test_a_real_log_has_no_truth(make_runs):
    assert not truth.find(make_runs(truth=False)).known


def test_with_several_resources_each_axis_has_its_own_asymptote(make_runs, tmp_path):
    config = preset("smoke")
    card = {"asymptote": 0.4253, "v": 0.135}
    data = {"name": "known_truth", "preset": "smoke", "overrides": {}, "history_length": 8}
    record = {"status": "done", "run_id": "a", "config": {"data": data}, "data": {"card": card}}
    runs.write_record(tmp_path / "runs" / "a", record)
    found = truth.find(make_runs().assign(asymptote=0.4253, preset="smoke"), tmp_path)
    # Half v times the variance that the other parts still hide.
    tails = config.c_l * 9.0**-config.lam, config.c_m * config.fresh_share(), config.quanta_tail()
    for axis, missing in (("dense_params", tails[0] + tails[1]), ("history_length", tails[1] + tails[2])):
        assert found.floor(axis) - 0.4253 == pytest.approx(0.5 * 0.135 * missing, rel=0.1)
    assert found.floor("train_flops") == found.floor("dense_params") != found.asymptote
    unrecorded = truth.find(make_runs().assign(preset="smoke"))
    assert not unrecorded.floors and "several resources" in unrecorded.notes[0]
    assert truth.from_mapping(found.as_dict()) == found


def test_exponents_only_of_parts_the_log_has():
    assert set(truth.exponents_of(preset("dense_nested"))) == {"dense_params", "examples"}
    assert truth.exponents_of(preset("memory"))["memory_slots"] == pytest.approx(0.35)


def test_given_truth_is_checked():
    assert truth.from_mapping({"alpha": 0.3, "asymptote": 0.4}).exponents == {"dense_params": 0.3}
    with pytest.raises(ValueError, match="no key beta"):
        truth.from_mapping({"beta": 1})


# Estimands


def test_three_exponents_stand_side_by_side_and_only_the_exact_one_is_true(summary, page, out):
    screen = io.StringIO()
    print_summary(summary, Console(file=screen, width=200))
    told = summary["estimands"]["dense_params"]
    assert json.loads((out / "report" / "fit.json").read_text())["estimands"]["dense_params"] == told
    for name in TRUE:
        assert told[name]["E_known"]["E"]["value"] == 0.4255
        assert told[name]["E_free"]["alpha"]["value"] != told[name]["E_known"]["alpha"]["value"]
        for *_, words in told[name]["text"]:
            assert words in page
        own = [line for line in screen.getvalue().splitlines() if line.startswith(f"{name}, ")]
        assert [("true" in line, line.split(", ")[1].split(" (")[0]) for line in own] == [
            (False, "E free"), (False, "E known"), (True, "exact slope"),
        ]  # fmt: skip
    words = "a perfect learner limited by dense parameters alone"
    assert words in screen.getvalue() and "the exponent of this architecture" in screen.getvalue()


def test_the_exact_slope_is_that_of_the_closed_form():
    rows = pd.DataFrame({"dense_params": np.geomspace(1e5, 1e7, 5), "memory_slots": np.geomspace(1e3, 1e5, 5)})
    dense = truth.Log(preset("dense_nested"), None, {})
    many, few = (estimands.exact_slope(dense, "dense_params", rows.assign(examples=n))[0] for n in (1e12, 1e6))
    # Rows without end leave the teacher's exponent; few rows leave less of it the larger the learner.
    assert many.slope == pytest.approx(0.35, abs=0.02) and few.last < few.first < many.first + 0.01
    memory = truth.Log(preset("memory", shares=(0.0, 0.0, 1.0, 0.0), codes="none"), None, {})
    slots, _ = estimands.exact_slope(memory, "memory_slots", rows)
    assert slots.slope == pytest.approx(memory.config.a - 1, abs=0.05)
    for log, axis, words in ((None, "dense_params", "not recorded"), (memory, "dense_params", "no closed form")):
        found, reason = estimands.exact_slope(log, axis, rows.assign(examples=1e6))
        assert found is None and words in reason


def test_a_preset_whose_settings_were_changed_is_not_taken_for_it(make_runs):
    assert truth.find(make_runs()).log.config == preset("dense_nested")
    changed = truth.find(make_runs().assign(entropy_floor=0.4259))
    assert changed.asymptote == 0.4255 and changed.log is None
    said = truth.find(make_runs().assign(preset_changes='{"alpha": 0.5}'))
    assert said.log.config == preset("dense_nested", alpha=0.5) and said.alpha == 0.5


def test_runs_below_the_asymptote_have_no_law_above_it(make_runs, tmp_path):
    make_runs(diverged=False, floor=0.42, laws={"rankmixer": (0.026, 0.7)}).to_parquet(tmp_path / "runs.parquet")
    made = make_report(tmp_path, axes="dense_params", bootstrap=0)
    told = made["estimands"]["dense_params"]["rankmixer"]
    assert "E_known" not in told and "runs lie at or below the exact asymptote" in told["without"]


# Report


def test_the_summary_is_plain_and_holds_the_true_law(summary):
    assert json.loads(json.dumps(summary)) == summary
    for name, (_, alpha) in TRUE.items():
        entry = summary["architectures"][name]
        low, high = entry["exponent"]["interval"]
        assert low - 0.02 < alpha < high + 0.02 and entry["exponent"]["method"].startswith("95 %")
        assert entry["E"]["value"] == pytest.approx(0.434, abs=5e-4)
        assert abs(entry["held_out"]["error"]) < 5e-4
    assert summary["truth"]["asymptote"] == 0.4255 and summary["truth"]["alpha"] == 0.35
    assert summary["runs"] == {"done": 41, "diverged": 1}
    assert not summary["architectures"]["rankmixer"]["law"]


def test_fit_json_holds_a_record_per_fit_with_exclusions_by_name(summary, out):
    written = json.loads((out / "report" / "fit.json").read_text())
    table = pd.read_parquet(out / "runs.parquet")
    record = written["records"]["dense_params"]["rankmixer"]
    reasons = {e["run_id"]: e["reason"] for e in record["runs"]["excluded"]}
    lost = table.loc[table["status"] == "diverged", "run_id"].iloc[0]
    assert reasons[lost] == "status diverged" and record["runs"]["diverged"] == 1
    assert len(reasons) == 3 and "held" not in reasons
    assert written["truth"] == summary["truth"]


def test_facts_of_our_own_runs_enter_the_record(make_runs):
    _, view = roles(make_runs().assign(group_id="g"), axes=["dense_params"])
    record = view.series[0].record
    assert "embedding tables" in record["hypothesis"]["size_counts"]
    assert "hypothesis.size_counts" not in record["checklist"]["missing"]
    _, foreign = roles(make_runs(), axes=["dense_params"])
    assert "hypothesis.size_counts" in foreign.series[0].record["checklist"]["missing"]


class _Outline(HTMLParser):
    """Checks nesting, unique ids and that nothing is loaded from elsewhere."""

    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.outside, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith("#"):
                self.outside.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_stands_alone(page):
    outline = _Outline()
    outline.feed(page)
    assert outline.open == [] and outline.outside == []
    assert len(outline.ids) == len(set(outline.ids))
    assert not outline.tags & {"script", "link", "iframe", "img", "object"}
    assert "svg" in outline.tags and "@import" not in page and "url(http" not in page


def test_the_page_names_every_run_refusal_and_truth(page, out, summary):
    table = pd.read_parquet(out / "runs.parquet")
    assert all(run in page for run in table["run_id"])
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for part in ("diverged", "loss was not finite at step 812", "quanta known", "true E 0.4255", "uncalibrated",
                 "incomplete", "titles say trend, not law", "95 % profile, noise of clusters",
                 summary["provenance"]["date"], summary["summary"][0]):  # fmt: skip
        assert part in text


def test_text_from_the_table_cannot_break_the_page(make_runs, tmp_path):
    table = make_runs({"<b>x</b>": (0.03, 0.5)}, seeds=2, sweep='<script>alert("1")</script>')
    table.to_parquet(tmp_path / "runs.parquet")
    made = make_report(tmp_path, axes="dense_params", bootstrap=0, profile=False)
    text = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in text and "<b>x</b>" not in text
    print_summary(made, Console(file=io.StringIO()))


def test_refusals_replace_numbers_everywhere(make_runs, tmp_path):
    make_runs(sizes=(2e3, 5e3, 1.2e4, 3e4)).to_parquet(tmp_path / "runs.parquet")
    made = make_report(tmp_path, axes="dense_params", **FAST)
    entry = made["architectures"]["rankmixer"]
    assert entry["E"]["value"] is None and entry["exponent"]["value"] is None
    assert entry["exponent"]["gates"] == ["span"] and "3 distinct values" in entry["exponent"]["refused"]
    assert entry["held_out"]["predicted"] is None and entry["held_out"]["measured"] > 0.43
    screen = io.StringIO()
    print_summary(made, Console(file=screen, width=100))
    assert "alpha refused (span)" in screen.getvalue() and "0.35" not in screen.getvalue()


def test_five_fitted_sizes_are_too_few_for_a_floor_and_its_exponent(make_runs, tmp_path):
    make_runs(TRUE, sizes=(1.7e3, 4.9e3, 1.4e4, 4e4, 1.2e5, 3e5), noise=3e-5, floor=0.434).to_parquet(
        tmp_path / "runs.parquet"
    )
    made = make_report(tmp_path, axes="dense_params", **FAST)
    exponent = made["architectures"]["dcnv2"]["exponent"]
    assert exponent["value"] is None and "clusters to spare" in made["architectures"]["dcnv2"]["E"]["refused"]


def test_sizes_and_examples_give_a_joint_law_as_well(make_runs, tmp_path):
    table = make_runs({"rankmixer": (0.03, 0.7)}, examples=np.geomspace(1e4, 1e7, 9), data_term=(0.01, 0.7), seeds=1,
                      noise=5e-4, diverged=False)  # fmt: skip
    table.to_parquet(tmp_path / "runs.parquet")
    made = make_report(tmp_path, bootstrap=30, profile=False)
    assert list(made["axes"]) == ["dense_params", "examples", "train_flops"]
    joint = made["joint"]["rankmixer"]
    assert joint["parameters"]["alpha"]["value"] == pytest.approx(0.7, rel=0.05)
    assert joint["parameters"]["beta"]["value"] == pytest.approx(0.7, rel=0.05)
    assert joint["held_out_rms_error"] < 5e-4
    assert {p.name for p in (tmp_path / "report").glob("*.png")} == {
        "loss.png", "loss_examples.png", "loss_train_flops.png", "loss_joint_rankmixer.png",
    }  # fmt: skip


def test_a_form_of_several_axes_is_fitted_jointly_on_the_axes_given(make_runs, tmp_path):
    examples = np.geomspace(1e4, 1e7, 5)
    table = make_runs({"rankmixer": (0.03, 0.5)}, examples=examples, data_term=(0.02, 0.4), seeds=1, diverged=False)
    table.to_parquet(tmp_path / "runs.parquet")
    for form, axes, exponent in (
        ("sum", ["dense_params", "examples"], "alpha_dense_params"),
        ("chinchilla_tied", {"N": "dense_params", "D": "examples"}, "alpha"),
    ):
        made = make_report(tmp_path, form=form, axes=axes, bootstrap=0, profile=False)
        assert list(made["axes"]) == ["dense_params", "examples"] and made["form"] == "power_offset"
        joint = made["joint"]["rankmixer"]
        assert joint["form"] == form and set(joint["axes"].values()) == {"dense_params", "examples"}
        assert joint["parameters"][exponent]["value"] is not None


def test_a_table_is_collected_from_run_folders(tmp_path):
    for k, dense in enumerate(np.geomspace(1e3, 1e6, 8).round()):
        record = {
            "run_id": f"run{k}", "shape_id": f"shape{k}", "status": "done", "sweep": "s",
            "config": {"architecture": "dcnv2", "seed": 0, "data": {"name": "clicks"}, "training": {"lr": 1e-3}},
            "counts": {"dense_params": int(dense)}, "work": {"examples": 1000, "train_flops": 6e3 * dense},
            "metrics": {"logloss": 0.4 + dense**-0.5}, "versions": {"jax": "0.0"}, "device": {"kind": "cpu"},
        }  # fmt: skip
        runs.write_record(tmp_path / "runs" / f"run{k}", record)
    made = make_report(tmp_path, axes="dense_params", **FAST)
    assert made["provenance"]["trained_with"] == {"jax": ["0.0"]} and made["provenance"]["trained_on"] == ["cpu"]
    assert made["truth"]["asymptote"] is None
    with pytest.raises(FileNotFoundError, match="no folder"):
        make_report(tmp_path / "nowhere")


def test_coverage_is_measured_where_runs_are_enough(make_runs):
    table = make_runs({"rankmixer": (0.03, 0.5)}, sizes=np.geomspace(1e3, 1e6, 18), seeds=2, diverged=False)
    (view,) = views.make_views(table, axes=["dense_params"], **FAST)
    (series,) = views.scored(view, draws=40).series
    share, points = series.coverage(2.0)
    assert points >= 10 and 0.0 <= share <= 1.0
    held = series.rolling.points.query("form == 'power_offset' and ratio_bin == '<=3x'")
    assert share == pytest.approx(((held["actual"] >= held["low_95"]) & (held["actual"] <= held["high_95"])).mean())
    assert view.series[0].coverage(2.0) is None
    assert not [name for name in series.record["checklist"]["missing"] if name == "validation"]
    assert captions.coverages([series]) == [
        f"coverage at ×{captions.extrapolation(series):.2g}: {share:.2f} of nominal 0.95 ({points} held-out points)"
    ]
    assert captions.coverages(view.series)[0].endswith("uncalibrated")


# Command


def test_the_command_prints_numbers_beside_the_truth_and_json_last(out, summary):
    result = CliRunner().invoke(plot, [str(out), "--axes", "dense_params", "--bootstrap", "60", "--json"])
    assert result.exit_code == 0, result.output
    lines = result.output.strip().splitlines()
    printed = json.loads(lines[-1])
    assert printed["architectures"]["dcnv2"]["E"]["value"] == summary["architectures"]["dcnv2"]["E"]["value"]
    assert "E given: 0.4255" in result.output and "report.html" in result.output
    assert "dcnv2: fitted to " in result.output and "values of dense_params from " in result.output
    assert " held out" in printed["architectures"]["dcnv2"]["rows_text"].partition("; not fitted: ")[2]


def test_the_command_can_fit_every_size(out):
    arguments = [str(out), "--axes", "dense_params", "--bootstrap", "0", "--no-hold-out", "--json"]
    printed = json.loads(CliRunner().invoke(plot, arguments).output.strip().splitlines()[-1])
    assert printed["architectures"]["dcnv2"]["held_out"] is None
    assert printed["architectures"]["dcnv2"]["fitted_sizes"] == 7


def test_axes_are_columns_or_slots():
    assert parse_axes("") is None
    assert parse_axes("dense_params, examples") == ["dense_params", "examples"]
    assert parse_axes("N=dense_params,D=examples") == {"N": "dense_params", "D": "examples"}
    for wrong in ("a,", "N=a,b", "N="):
        with pytest.raises(ValueError, match="neither a list of columns"):
            parse_axes(wrong)
    with pytest.raises(ValueError, match="names 'N' twice"):
        parse_axes("N=a,N=b")


def test_a_torn_table_is_named(tmp_path):
    (tmp_path / "runs.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match="runs.parquet cannot be read as parquet"):
        make_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder .*runs.parquet"):
        make_report(tmp_path / "runs.parquet")


def test_numbers_carry_the_digits_they_deserve():
    assert value_text(0.42134, (0.4182, 0.4241)) == "0.4213 [0.4182, 0.4241]"
    assert value_text(0.3512, (0.21, 0.55)) == "0.35 [0.21, 0.55]"
    assert value_text(0.35) == "0.35" and value_text(float("nan")) == "not finite"
    numbers = {1720: "1.72k", 1_280_000: "1.28M", 2.5e9: "2.5G", 96: "96", 1e16: "1e16", 2.56e19: "2.56e19"}
    assert [amount(number) for number in numbers] == list(numbers.values())
    assert shortened("one two three", 8) == "one two…" and shortened("short", 8) == "short"
