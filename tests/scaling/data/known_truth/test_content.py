"""Content of the known-truth log: tokens say the hidden signs of items, queries what a history asks for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from recscale.models.inputs.tables import EmbeddingTables
from recscale.scaling.data.known_truth import build_world, make_batch, make_schema, preset
from recscale.scaling.data.known_truth.content import item_tokens, query_tokens
from recscale.scaling.data.known_truth.exact import truth
from recscale.scaling.data.known_truth.world import history_word

SMALL = dict(quanta=8, blocks=4, history_max=8, content_tokens=6, query_tokens=4)


def batch_of(config, requests=512):
    return jax.device_get(jax.jit(lambda k: make_batch(build_world(config), 0, k, requests))(np.int32(0)))


@pytest.fixture(scope="module")
def config():
    return preset("smoke", **SMALL)


def test_tokens_name_the_signs_of_items(config):
    world = build_world(dataclasses.replace(config, content_flip=0.0))
    ids = jnp.arange(128)
    tokens = np.asarray(item_tokens(world, ids))
    assert tokens.shape == (128, 6) and tokens.min() >= 1 and tokens.max() <= 6 * 8
    np.testing.assert_array_equal((tokens - 1) // 8, np.broadcast_to(np.arange(6), tokens.shape))
    # Items with the same signs have the same content, and others do not; queries speak the same language.
    words = np.asarray(history_word(world, ids))
    same = (tokens[:, None] == tokens[None]).all(axis=-1)
    assert not (same < (words[:, None] == words[None])).any() and same.mean() < 0.1
    np.testing.assert_array_equal(query_tokens(world.config, jnp.asarray(words)), tokens[:, :4])
    noisy = np.asarray(item_tokens(build_world(dataclasses.replace(config, content_flip=0.2)), ids))
    assert 0.5 * (1 - 0.8**3) < (noisy != tokens).mean() < 1.5 * (1 - 0.8**3)


def test_a_query_asks_for_what_is_clicked(config):
    world, batch = build_world(config), batch_of(config, 4096)
    wanted = batch.user.ids["query"]
    word = np.asarray(history_word(world, batch.candidates.ids["item"][:, 0]))
    agreement = config.code_width - 2.0 * np.bitwise_count(wanted.astype(np.uint32) ^ word)
    part = truth(world, batch).parts["L"][:, 0, 0]
    assert np.corrcoef(agreement, part)[0, 1] > 0.6
    assert (batch.user.ids["query_content"][wanted == wanted[0]] == batch.user.ids["query_content"][0]).all()


def test_content_adds_inputs_and_changes_nothing_else(config):
    plain = dataclasses.replace(config, content_tokens=0)
    assert plain.hash == preset("smoke", **{k: SMALL[k] for k in ("quanta", "blocks", "history_max")}).hash
    assert plain.truth_hash == config.truth_hash and plain.hash != config.hash
    schema, batch, without = make_schema(config), batch_of(config), batch_of(plain)
    np.testing.assert_array_equal(batch.labels, without.labels)
    inputs = EmbeddingTables(schema, rngs=nnx.Rngs(0)).lookup(batch)
    items, query = inputs.candidates.content, inputs.user.content
    np.testing.assert_array_equal(items.ids, batch.candidates.ids["item"])
    np.testing.assert_array_equal(query.history["clicks"], batch.user.histories["clicks"].ids["item"])
    half = batch_of(config, 256)
    np.testing.assert_array_equal(half.user.ids["query"], batch.user.ids["query"][:256])
    np.testing.assert_array_equal(half.candidates.ids["content"], batch.candidates.ids["content"][:256])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(shares=(1.0, 0.0, 0.0, 0.0), content_tokens=2), "0 unless L has a share"),
        (dict(content_tokens=2, query_tokens=3), "expected 1 to content_tokens, 2"),
        (dict(content_flip=0.5), "a probability below one half"),
    ],
)
def test_wrong_settings_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        preset("smoke", **flags)
