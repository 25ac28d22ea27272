"""What served the operations of a run is in its record, and the environment decides it for a whole model."""

import pytest

from recscale.scaling.data import make_source
from recscale.scaling.training import get_config, train
from recscale.scaling.training.step import make_trainer


def make_config():
    config = get_config("pkm", "known_truth")
    config.data.preset = "smoke"
    config.data.holdout_rows = 512
    config.model.update({"tokens": 4, "width": 8, "hidden": 16, "memory_slots": 64, "memory_topk": 4, "key_width": 4})
    config.training.update({"requests": 64, "examples": 64 * 2, "warmup_examples": 64})
    return config


def test_a_traced_step_knows_what_serves_it(monkeypatch):
    monkeypatch.setenv("RECSCALE_IMPLEMENTATION", "sparse_gather=reference,per_token_ffn=xla")
    config = make_config()
    source = make_source(config.data.to_dict(), requests=64, candidates=1)
    trainer = make_trainer(config, source, [(0, 1e-3)], warmup=1)
    trainer.program.trace(trainer.state_shapes(), None)
    assert trainer.kernels == {
        "product_key_topk": {"xla": ""},
        "sparse_gather": {"reference": "asked for"},
        "per_token_ffn": {"xla": "asked for"},
    }


@pytest.mark.slow
def test_a_record_says_what_served_the_run(tmp_path):
    assert train(make_config(), tmp_path)["kernels"] == {"product_key_topk": {"xla": ""}, "sparse_gather": {"xla": ""}}
