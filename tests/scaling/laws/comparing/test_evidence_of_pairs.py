"""What a comparison rests on, case by case: matched shapes, paired seeds, the checklist, and orders at small scale."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from recscale.scaling.laws.comparing import checklist, decision_accuracy, equal_loss, pairing
from recscale.scaling.laws.comparing.checklist import Evidence, Item
from recscale.scaling.laws.comparing.compare import Comparison, EqualLoss, Interval
from recscale.scaling.laws.comparing.decision_accuracy import Accuracy, wilson_interval
from recscale.scaling.laws.judgement.gates import Gate


def runs(sizes=(1.0, 10.0), seeds=(0, 1, 2), **columns):
    rows = [
        {"architecture": name, "shape_id": f"{name}{size:g}", "train_flops": size, "seed": seed, "data_seed": seed}
        for name in "ab"
        for size in sizes
        for seed in seeds
    ]
    return pd.DataFrame(rows).assign(**columns)


def matched(frame, column=None):
    is_a = (frame.architecture == "a").to_numpy()
    return pairing.match_clusters(frame, is_a, frame.shape_id.to_numpy(), "train_flops", column), is_a


def test_shapes_are_matched_by_budget_then_name_then_axis():
    found, _ = matched(runs())
    assert found.matched and found.column == "train_flops" and list(found.codes) == [0, 0, 0, 1, 1, 1] * 2
    planned = runs().assign(flops_target=lambda t: 100 / t.train_flops)
    found, _ = matched(planned)
    assert found.column == "flops_target" and list(found.codes) == [1, 1, 1, 0, 0, 0] * 2
    assert matched(planned, "train_flops")[0].column == "train_flops"
    # A column that does not pair them is passed over, and named where none does.
    odd = planned.assign(flops_target=planned.flops_target.where(planned.index > 0))
    assert matched(odd)[0].column == "train_flops"
    alone, _ = matched(runs().iloc[:9])
    assert not alone.matched and alone.column is None and "1 shapes have no partner" in alone.reason
    assert len(set(alone.codes)) == 3 and list(alone.codes) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    same, _ = matched(runs().assign(train_flops=1.0))
    assert not same.matched and "several shapes of one architecture" in same.reason
    with pytest.raises(KeyError, match="no column 'arm'"):
        matched(runs(), "arm")


def test_shapes_with_other_streams_are_not_matched():
    frame = runs()
    other = frame.assign(data_seed=np.where(frame.index == 0, 9, frame.data_seed))
    assert "data seeds differ at 1 of 2 sizes" in matched(other)[0].reason
    assert matched(other.drop(columns="data_seed"))[0].matched


def test_seeds_are_paired_by_stream_and_seed_or_by_stream():
    rng = np.random.default_rng(0)
    frame = runs(seeds=(0, 1, 2, 3), logloss=rng.normal(size=16))
    matching, is_a = matched(frame)
    sizes, note = pairing.paired_seeds(frame, is_a, matching, "logloss")
    assert note == "paired by data_seed and seed" and [s.size for s in sizes] == ["1", "10"]
    y = frame.logloss.to_numpy().reshape(2, 2, 4)
    for k, size in enumerate(sizes):
        gap = y[0, k] - y[1, k]
        assert (size.pairs, size.mean) == (4, pytest.approx(gap.mean()))
        assert size.sd_difference == pytest.approx(gap.std(ddof=1))
        assert (size.sd_a, size.sd_b) == pytest.approx((y[0, k].std(ddof=1), y[1, k].std(ddof=1)))
        half = stats.t.ppf(0.975, 3) * gap.std(ddof=1) / 2
        assert size.interval == pytest.approx((gap.mean() - half, gap.mean() + half))
    apart = frame.assign(seed=frame.seed + 10 * is_a)
    assert pairing.paired_seeds(apart, is_a, matching, "logloss")[1] == "paired by data_seed"
    assert pairing.paired_seeds(frame.drop(columns="seed"), is_a, matching, "logloss")[1] == "paired by data_seed"
    neither = apart.assign(data_seed=apart.seed)
    assert pairing.paired_seeds(neither, is_a, matching, "logloss") == (
        [],
        "no data seed was run by both architectures",
    )
    gap = frame.assign(data_seed=frame.data_seed.where(frame.index > 0))
    assert "not recorded" in pairing.paired_seeds(gap, is_a, matching, "logloss")[1]
    one = frame[frame.seed == 0]
    matching, is_a = matched(one)
    single, _ = pairing.paired_seeds(one, is_a, matching, "logloss")
    assert [s.pairs for s in single] == [1, 1] and single[0].interval is None and single[0].sd_difference is None
    assert pairing.most_pairs(sizes) == 4 and pairing.most_pairs(single) == 1 and pairing.most_pairs([]) == 0
    unmatched, is_a = matched(frame.iloc[:12])
    assert pairing.paired_seeds(frame.iloc[:12], is_a, unmatched, "logloss")[1].startswith("shapes are not matched")


def sides(frame):
    return [(name, frame[frame.architecture == name]) for name in "ab"]


LADDER = runs(sizes=(1.0, 5.0, 10.0, 50.0, 100.0), lr_bracketed=True, lr_trials=3, dataset="log")


@pytest.mark.parametrize(
    ("changes", "ticked"),
    [
        ({}, True),
        ({"lr_bracketed": lambda t: t.index > 0}, False),
        ({"lr_bracketed": lambda t: pd.Series(True, t.index, dtype=object).where(t.index > 0)}, None),
        ({"lr_bracketed": lambda t: pd.Series(True, t.index, dtype=object).where(t.index < 29)}, None),
        ({"lr_trials": lambda t: np.where(t.architecture == "a", 4, 3)}, False),
        ({"lr_trials": lambda t: np.where(t.index == 0, np.nan, 3)}, None),
        ({"lr_trials": np.nan}, None),
        ({"lr_trials": lambda t: np.where(t.architecture == "a", 5, 3), "lr_first_trials": 3}, True),
        ({"lr_first_trials": lambda t: np.where(t.architecture == "a", 5, 3)}, False),
        ({"lr_trials": 5, "lr_first_trials": lambda t: np.where(t.architecture == "a", 5, np.nan)}, True),
        ({"lr_trials": 5, "lr_first_trials": lambda t: np.where(t.architecture == "a", 3, np.nan)}, False),
        ({"lr_trials": 3 + 2 * (LADDER.index % 2), "lr_first_trials": np.where(LADDER.index % 2, 3, np.nan)}, True),
        ({"lr_first_trials": 3, "lr_bracketed": lambda t: t.index > 0}, False),
    ],
)
def test_rates_are_bracketed_in_as_many_trials(changes, ticked):
    item = checklist._learning_rate(sides(LADDER.assign(**changes)))
    assert item.ticked is ticked and item.required
    assert checklist._learning_rate(sides(LADDER.drop(columns="lr_bracketed"))).ticked is None


@pytest.mark.parametrize(
    ("keep", "ticked"),
    [
        (lambda t: t.train_flops > 0, True),
        (lambda t: (t.train_flops != 5) | (t.architecture == "b"), False),
        (lambda t: (t.train_flops != 5) | (t.architecture == "a"), False),
    ],
)
def test_sizes_of_either_side(keep, ticked):
    assert checklist._sizes(sides(LADDER[keep(LADDER)]), "train_flops").ticked is ticked
    assert checklist._seeds(sides(LADDER.drop(columns="seed")), "train_flops").required
    for part in (LADDER, LADDER.assign(dataset=LADDER.architecture), LADDER.drop(columns="dataset")):
        assert checklist._stream(sides(part)).required
    narrow = LADDER.assign(train_flops=LADDER.train_flops**0.99)
    assert checklist._sizes(sides(narrow), "train_flops").ticked is False


def test_seeds_at_two_sizes_one_of_them_large():
    def ticked(*pairs):
        """Three seeds at these sizes, two at the others."""
        frame = LADDER[(LADDER.seed < 2) | LADDER.train_flops.isin(pairs)]
        return checklist._seeds(sides(frame), "train_flops").ticked

    assert ticked(1.0, 50.0) is True and ticked(5.0, 100.0) is True
    assert ticked(100.0) is False and ticked(1.0, 5.0, 10.0) is False  # 10 is below 100 / 100^(1/3)
    assert (
        checklist._seeds(sides(LADDER[(LADDER.architecture == "b") | (LADDER.seed < 2)]), "train_flops").ticked is False
    )
    assert checklist._seeds(sides(LADDER.drop(columns="seed")), "train_flops").ticked is None


def test_streams_counts_and_what_is_attached():
    stream = checklist._stream(sides(LADDER))
    assert stream.ticked is True and stream.detail == "equal: dataset, data_seed"
    other = LADDER.assign(dataset=LADDER.architecture)
    assert (
        checklist._stream(sides(other)).ticked is False and "dataset: ['a']" in checklist._stream(sides(other)).detail
    )
    assert checklist._stream(sides(LADDER.drop(columns="dataset"))).ticked is None
    epochs = LADDER.assign(epochs=np.where(LADDER.architecture == "a", 1, 2))
    assert checklist._stream(sides(epochs)).ticked is False
    counted = LADDER.assign(dense_params=1, active_params=1, embedding_params=1, train_flops_per_row=1, wall_s=1)
    assert checklist._counts(counted, "train_flops", None) == Item(
        "counts", checklist._counts(counted, "x", None).text, True, "compared along train_flops", False
    )
    gap = counted.assign(wall_s=np.where(counted.index > 0, 1.0, np.nan))
    found = checklist._counts(gap, "train_flops", "FLOPs")
    assert found.ticked is None and found.detail == "not recorded: wall_s; equalised: FLOPs"
    assert checklist._attached(counted, "hash").ticked is None
    assert checklist._attached(counted.assign(run_id="r"), "hash") == Item(
        "attached", "run table and seeds attached", True, "table hash", False
    )
    assert checklist._attached(counted.assign(run_id="r").drop(columns="seed"), "hash").ticked is None
    assert checklist._divergences(None).ticked is None
    assert checklist._divergences({"a": 2, "b": 0}) == Item(
        "divergences", "diverged runs are counted", True, "a: 2; b: 0", False
    )


@pytest.mark.parametrize(("bootstrap", "models", "ticked"), [(True, 2, True), (True, 1, False), (False, 3, False)])
def test_the_checklist_has_an_item_for_everything(bootstrap, models, ticked):
    evidence = Evidence(bootstrap, models, True, "held", "spec", None, {"a": 0, "b": 0}, "hash")
    is_a = (LADDER.architecture == "a").to_numpy()
    pairs = [pairing.PairedSize("1", 5, 0.0, None, None, None, None)]
    items = checklist.checklist(
        LADDER, is_a, ("a", "b"), "train_flops", "logloss", pairs, "paired", evidence,
        min_paired_seeds=5, equalised=None, known_truth=None,
    )  # fmt: skip
    told = {item.id: (item.ticked, item.required) for item in items}
    assert told == {
        "learning_rate": (True, True), "sizes": (True, True), "seeds": (True, True), "paired_seeds": (True, True),
        "divergences": (True, False), "data_stream": (True, True), "counts": (None, False),
        "primary_metric": (True, True), "held_out": (True, True), "difference_test": (ticked, True),
        "specification_curve": (None, True), "known_truth": (None, False), "attached": (None, False),
    }  # fmt: skip
    again = checklist.checklist(
        LADDER, is_a, ("a", "b"), "train_flops", "auc", pairs, "paired", evidence,
        min_paired_seeds=6, equalised=None, known_truth="record",
    )  # fmt: skip
    told = {item.id: item.ticked for item in again}
    assert told["paired_seeds"] is False and told["primary_metric"] is False and told["known_truth"] is True
    lacking = checklist.missing(items)
    assert len(lacking) == (1 if ticked else 2) and lacking[-1].endswith("not recorded (spec)")
    assert ticked or ": no (" in lacking[0]


def test_a_share_of_the_axis_needs_its_items_and_one_side():
    def verdict(ends, items=(), gates=(), multiplier=2.0):
        found = [
            EqualLoss(where, 0.4, multiplier, None if pair is None else Interval(*pair, "made up"))
            for where, pair in zip(("worst", "middle", "best"), ends, strict=True)
        ]
        return equal_loss.equal_loss(
            Comparison("a", "b", "x", "logloss", multipliers=found, checklist=list(items), gates=list(gates))
        )

    above, below, across = (1.5, 4.0), (0.25, 0.5), (0.8, 1.2)
    assert verdict([above] * 3).answer == "yes" and verdict([below] * 3).answer == "no"
    for ends in (
        [above, above, across],
        [above, below, above],
        [(1.0, 2.0)] * 3,
        [(0.5, 1.0)] * 3,
        [above, None, above],
    ):
        assert verdict(ends).answer == "cannot tell"
    share = verdict([above] * 3).middle
    assert share.value == 0.5 and (share.interval.low, share.interval.high) == (0.25, 1 / 1.5)
    ticked, lacking = Item("seeds", "seeds", True, "", True), Item("seeds", "seeds", None, "", True)
    other = Item("sizes", "sizes", False, "", True)
    assert verdict([above] * 3, [ticked, other]).answer == "yes"
    assert verdict([above] * 3, [lacking]).answer == "cannot tell"
    for gate, answer in (
        (Gate("dof", 1, "", False, refuses=("*",)), "cannot tell"), (Gate("clusters", 1, "", False), "cannot tell"),
        (Gate("span", 1, "", False, refuses=("E",)), "yes"), (Gate("dof", 1, "", True, refuses=("*",)), "yes"),
    ):  # fmt: skip
        assert verdict([above] * 3, gates=[gate]).answer == answer
    nothing = verdict([above] * 3, multiplier=None)
    assert (
        nothing.answer == "cannot tell"
        and nothing.middle is None
        and nothing.reasons == ("the two have no loss in common",)
    )


def noisy(gap, noise, scales=(1.0, 2.0)):
    """Two settings at two scales with three seeds each: b above a by `gap` and noise -1, 0, 1."""
    rows = [
        (name, scale, seed, 0.5 + (name == "b") * (gap + noise * (seed - 1)))
        for name in "ab"
        for scale in scales
        for seed in range(3)
    ]
    return pd.DataFrame(rows, columns=["setting", "scale", "seed", "y"])


def test_pairs_within_two_sds_cannot_be_called():
    frame = noisy(0.1, 0.04)
    assert decision_accuracy._paired_sd(frame, "a", "b", ["seed"]) == pytest.approx(0.04)
    uneven = pd.concat([frame, noisy(0.1, 0.1, (3.0,))])
    drop = uneven[(uneven.scale != 3.0) | (uneven.seed < 2)]
    # Pooled by degrees of freedom: 2, 2 and 1.
    expected = np.sqrt((4 * 0.04**2 + 0.1**2 / 2) / 5)
    assert decision_accuracy._paired_sd(drop, "a", "b", ["seed"]) == pytest.approx(expected)
    assert decision_accuracy._paired_sd(frame[frame.seed == 0], "a", "b", ["seed"]) is None
    assert decision_accuracy._paired_sd(frame[frame.setting == "a"], "a", "b", ["seed"]) is None
    for gap, close in ((0.081, False), (0.079, True)):
        final = pd.Series({"a": 0.5, "b": 0.5 + gap})
        counted, near, known = decision_accuracy._pairs(frame, final, ["seed"])
        assert (len(counted), len(near), known) == ((0, 1, True) if close else (1, 0, True))
    assert decision_accuracy._pairs(frame, pd.Series({"a": 0.5, "b": 0.5}), []) == ([("a", "b")], [], False)


def test_orders_are_those_of_means_over_seeds_at_shared_scales():
    """b is above a but at the smallest scale; 8 was run by a alone."""
    y = {("a", 1): 0.6, ("b", 1): 0.5, ("a", 2): 0.4, ("b", 2): 0.45, ("a", 4): 0.3, ("b", 4): 0.5, ("a", 8): 0.2}
    rows = [(name, scale, 0, value) for (name, scale), value in y.items()] + [("a", 4, 1, 0.3), ("a", 4, 2, 0.3)]
    table = pd.DataFrame(rows, columns=["architecture", "flops_target", "seed", "logloss"])
    table["train_flops"] = table.flops_target * 1.0
    found = decision_accuracy.decision_accuracy(table, forms=())
    assert [(one.name, one.right, one.pairs) for one in found.accuracies] == [("1", 0, 1), ("2", 1, 1)]
    assert found.target_scale == 4.0 and found.too_close == []
    fewest = decision_accuracy.decision_accuracy(table[table.flops_target > 1], forms=())
    assert [(one.name, one.right) for one in fewest.accuracies] == [("2", 1)]
    for few in (table[table.flops_target == 1], table[table.architecture == "a"]):
        with pytest.raises(ValueError, match="need two settings and two scales"):
            decision_accuracy.decision_accuracy(few, forms=())
    with pytest.raises(KeyError, match="no column 'arm'"):
        decision_accuracy.decision_accuracy(table, by="arm", forms=())


def test_orders_are_right_or_wrong():
    final = pd.Series({"a": 1.0, "b": 2.0, "c": 3.0})
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    found = decision_accuracy._accuracy("scale", "1", pd.Series({"a": 2.0, "b": 1.0, "c": 3.0}), pairs, final, "so")
    assert (found.right, found.pairs, found.share) == (2, 3, pytest.approx(2 / 3)) and found.note == "so"
    assert found.interval == wilson_interval(2, 3)
    part = decision_accuracy._accuracy("scale", "1", pd.Series({"a": 2.0, "c": 3.0}), pairs, final)
    assert (part.right, part.pairs) == (1, 1)
    none = decision_accuracy._accuracy("scale", "1", pd.Series({"a": 2.0}), pairs, final)
    assert (none.right, none.pairs, none.share, none.interval, none.note) == (0, 0, None, None, "no pair to call")
    p, n, z = 0.25, 8, stats.norm.ppf(0.95)
    low, high = wilson_interval(2, 8, level=0.9)
    # Wilson's ends are where the score test of the share is just rejected.
    for end in (low, high):
        assert abs(p - end) / np.sqrt(end * (1 - end) / n) == pytest.approx(z)
    for right, total in ((-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="of"):
            wilson_interval(right, total)
    assert wilson_interval(1, 1)[1] == 1.0 and wilson_interval(0, 1)[0] == 0.0


def test_a_law_has_to_beat_the_best_single_scale():
    def verdict(law, single, known=True):
        rows = [Accuracy("scale", "1", 1, 4, 0.25, None), Accuracy("scale", "2", int(4 * single), 4, single, None)]
        rows += [Accuracy("form", "power", int(4 * law), 4, law, None), Accuracy("form", "kappa", 0, 0, None, None)]
        return decision_accuracy._verdict(rows, ["pair"], [], known)

    assert "(power, 3/4) beats ranking at scale 2 (2/4)" in verdict(0.75, 0.5) and "unknown" not in verdict(0.75, 0.5)
    assert "does not beat" in verdict(0.5, 0.5) and verdict(0.5, 0.5, False).startswith("seed noise unknown")
    assert decision_accuracy._verdict([], [], ["pair"], True) == "all 1 pairs are too close to call"
    assert "no law could be fitted" in decision_accuracy._verdict(
        [Accuracy("scale", "1", 1, 4, 0.25, None)], ["pair"], [], True
    )


def test_a_law_of_each_setting_predicts_its_own_largest_scale(monkeypatch):
    problems = []

    def solve(problem):
        problems.append(problem)
        return type("Solved", (), {"phi": np.log([0.4, 0.05, 0.5])})

    monkeypatch.setattr(decision_accuracy, "solve", solve)
    x = np.array([1.0, 10.0, 100.0, 1000.0, 1e4])
    rows = [(name, k, value * scale, 0.5) for name, scale in (("a", 1.0), ("b", 2.0)) for k, value in enumerate(x)]
    frame = pd.DataFrame(rows, columns=["setting", "scale", "x", "y"])
    form = decision_accuracy.registry.get("power_offset")
    told, short = decision_accuracy._form_predictions(form, frame, 4, 0.02)
    assert short == [] and len(problems) == 2 and np.all(problems[0].delta == 0.02)
    np.testing.assert_allclose(problems[1].axes[:, 0], np.log(10) * np.array([-1.5, -0.5, 0.5, 1.5]))
    expected = 0.4 + 0.05 * np.exp(-0.5 * np.log(10) * 2.5)
    assert told.to_dict() == pytest.approx({"a": expected, "b": expected})
    fewer = frame[(frame.setting == "b") | (frame.scale > 0)]
    told, short = decision_accuracy._form_predictions(form, fewer, 4, 0.02)
    assert list(told.index) == ["b"] and short == ["a"]
    with pytest.raises(ValueError, match="one-axis forms"):
        decision_accuracy._form_predictions(decision_accuracy.registry.get("chinchilla"), frame, 4, 0.02)
