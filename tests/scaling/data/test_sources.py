"""From the `data` section of a configuration to a source."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from ml_collections import ConfigDict

from recscale.scaling.data import list_sources, make_source
from recscale.scaling.data.source import Source


@pytest.fixture
def root(write_recbole, load_movielens, tmp_path):
    return str(load_movielens(write_recbole(tmp_path / "set")).folder)


def test_an_imported_log_by_its_folder(root):
    source = make_source({"name": "stored", "root": root}, requests=8)
    assert isinstance(source, Source) and not source.on_device
    assert source.total_rows == 35 and source.requests == 8 and source.candidates == 1
    assert source.facts()["report"]["dropped"]["unparsable"] == 2


def test_a_run_configuration_with_all_its_keys(root, tmp_path):
    """Keys of another set's vocabulary hold their defaults; 0 and "" stand for none."""
    config = ConfigDict(
        {"name": "stored", "root": root, "preset": "dense", "overrides": {}, "log_seed": 3}
        | {"history_length": 0, "holdout_rows": 2, "order": "shuffle", "passes": 2}
    )
    source = make_source(config, requests=4, candidates=2, cache_dir=tmp_path / "cache")
    facts = source.facts()
    assert facts["history_length"] == {"history": 64} and facts["shuffle_seed"] == 3 and facts["passes"] == 2
    assert facts["holdout_requests"] == {"valid": 1, "test": 1}
    assert source.schema.sequences[0].length == 64
    config.history_length = 100
    assert make_source(config, requests=4).batch(0).user.histories["history"].ids["item"].shape == (4, 100)
    with pytest.raises(ValueError, match="holds the log .* was planned on abc"):
        make_source(dict(config.items()) | {"log": "abc"}, requests=4)
    half = make_source(config, requests=4, host=1, hosts=2).batch(0)
    np.testing.assert_array_equal(half.valid, make_source(config, requests=4).batch(0).valid[2:])


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"name": "storred"}, KeyError, "unknown data set 'storred'; did you mean 'stored'"),
        ({"name": "stored", "rooot": "x"}, KeyError, "unknown key 'rooot'.*did you mean 'root'"),
        ({"root": "x"}, KeyError, "names no data set"),
        ({"name": "stored", "root": ""}, FileNotFoundError, "data.root is empty.*recscale data import"),
        ({"name": "stored", "root": "x"}, FileNotFoundError, "x holds no imported log"),
        ({"name": "stored", "root": "x", "overrides": {"b": 1}}, ValueError, "takes no overrides, found b"),
    ],
)
def test_errors_name_the_nearest(config, error, text):
    with pytest.raises(error, match=text):
        make_source(config, requests=8)


def test_names():
    assert list_sources() == ["known_truth", "stored"]


def test_known_truth_by_name(tmp_path):
    """A run configuration reaches the generator: preset, overrides, stream, history length and holdout."""
    config = ConfigDict({"name": "known_truth", "preset": "smoke", "overrides": {"embedding_width": 4}, "log_seed": 2})
    config.update({"root": "", "history_length": 7, "holdout_rows": 100, "order": "time", "passes": 1})
    source = make_source(config, requests=8, candidates=2, cache_dir=tmp_path)
    assert isinstance(source, Source) and source.on_device and source.total_rows is None
    assert (source.requests, source.candidates, source.log_seed, source.holdout_rows) == (8, 2, 2, 100)
    assert source.schema.sequences[0].length == 7 and source.config.embedding_width == 4
    assert source.config.history_max == 32, "the smoke preset"
    whole = make_source({"name": "known_truth", "preset": "smoke"}, requests=8)
    assert whole.schema.sequences[0].length == 32 and whole.log_seed == 0


@pytest.mark.parametrize("change", [{"order": "shuffle"}, {"passes": 2}])
def test_an_endless_stream_has_no_passes(change):
    with pytest.raises(ValueError, match="known_truth is an endless stream"):
        make_source({"name": "known_truth", "preset": "smoke"} | change, requests=8)


@pytest.mark.parametrize(("name", "other"), [("stored", "known_truth"), ("known_truth", "stored_log")])
def test_one_set_does_not_import_another(root, name, other):
    config = {"name": name, "root": root}
    if name == "known_truth":
        config = {"name": name, "preset": "smoke"}
    script = f"""
        import sys
        from recscale.scaling.data import make_source
        make_source({config!r}, requests=8)
        print([name for name in sys.modules if name.split(".")[-1].startswith({other!r}) and "recscale" in name])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
