"""From the `data` section of a configuration to a source."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from ml_collections import ConfigDict

from recscale.scaling.data import list_sources, make_source
from recscale.scaling.data.source import Source

LOOSE = dict(name="movielens-100k", max_dropped=0.2, allow_modified=True)


def test_movielens_by_name(write_recbole, tmp_path):
    root = write_recbole(tmp_path / "set")
    source = make_source(LOOSE | {"root": str(root)}, requests=8)
    assert isinstance(source, Source) and not source.on_device
    assert source.total_rows == 35 and source.requests == 8 and source.candidates == 1
    assert source.facts()["report"]["dropped"]["unparsable"] == 2


def test_a_run_configuration_with_all_its_keys(write_recbole, tmp_path):
    """Keys of another set's vocabulary hold their defaults; 0 and "" stand for none."""
    config = ConfigDict(
        LOOSE
        | {"root": str(write_recbole(tmp_path / "set")), "preset": "dense", "overrides": {}, "log_seed": 3}
        | {"history_length": 0, "holdout_rows": 2, "order": "shuffle", "passes": 2}
    )
    source = make_source(config, requests=4, candidates=2, cache_dir=tmp_path / "cache")
    facts = source.facts()
    assert facts["history_length"] == {"history": 64} and facts["shuffle_seed"] == 3 and facts["passes"] == 2
    assert facts["holdout_requests"] == {"valid": 1, "test": 1}
    assert source.schema.sequences[0].length == 64
    assert (tmp_path / "cache" / "movielens-100k").is_dir() and not (tmp_path / "set" / "packed").exists()
    config.history_length = 100
    assert make_source(config, requests=4).batch(0).user.histories["history"].ids["item"].shape == (4, 100)
    half = make_source(config, requests=4, host=1, hosts=2).batch(0)
    np.testing.assert_array_equal(half.valid, make_source(config, requests=4).batch(0).valid[2:])


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"name": "movielens100k"}, KeyError, "unknown data set 'movielens100k'; did you mean 'movielens-100k'"),
        ({"name": "movielens-100k", "rooot": "x"}, KeyError, "unknown key 'rooot'.*did you mean 'root'"),
        ({"root": "x"}, KeyError, "names no data set"),
        ({"name": "movielens-100k", "root": ""}, FileNotFoundError, "data.root is empty.*recscale data movielens-100k"),
        ({"name": "movielens-100k", "root": "x", "overrides": {"b": 1}}, ValueError, "takes no overrides, found b"),
    ],
)
def test_errors_name_the_nearest(config, error, text):
    with pytest.raises(error, match=text):
        make_source(config, requests=8)


def test_names():
    assert "movielens-100k" in list_sources()


def test_one_set_does_not_import_another(write_recbole, tmp_path):
    root = write_recbole(tmp_path / "set")
    script = f"""
        import sys
        from recscale.scaling.data import make_source
        make_source({LOOSE | {"root": str(root)}!r}, requests=8)
        print([name for name in sys.modules if "known_truth" in name])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
