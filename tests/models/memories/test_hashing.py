"""Hashed addresses: MurmurHash3 against published values and a second implementation, uniform slots, exact reads."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import normal
from flax import nnx
from scipy.stats import chi2

from recscale.models import count, freeze_config
from recscale.models.inputs import reference_schema
from recscale.models.memories.hashing import HashAddressing, murmur3
from recscale.models.memories.options import MemoryOptions
from recscale.models.memories.product_key_memory import ProductKeyMemory
from recscale.scaling.counting.abstract import abstract_model, forward_program, train_program, tree_params
from recscale.scaling.counting.jaxpr_flops import count_flops
from recscale.scaling.training import get_config
from recscale.scaling.training.preflight import check_settings

WORD = 2**32


def python_murmur3(words, seed):
    """MurmurHash3_x86_32 in whole numbers of Python."""

    def rotate(x, by):
        return (x << by | x >> (32 - by)) % WORD

    h = seed
    for word in words:
        h ^= rotate(word * 0xCC9E2D51 % WORD, 15) * 0x1B873593 % WORD
        h = (rotate(h, 13) * 5 + 0xE6546B64) % WORD
    h ^= 4 * len(words)
    h = (h ^ h >> 16) * 0x85EBCA6B % WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 % WORD
    return h ^ h >> 16


def test_the_hash_is_murmur3():
    hashed = jax.jit(murmur3)
    for word, seed, published in (
        (0xFFFFFFFF, 0, 0x76293B50),
        (0x87654321, 0, 0xF55B516B),
        (0x87654321, 0x5082EDEE, 0x2362F9DE),
        (0, 0, 0x2362F9DE),
        (0x61616161, 0x9747B28C, 0x5A97808A),  # "aaaa"
    ):
        assert int(hashed(jnp.asarray([word], jnp.uint32), jnp.asarray(seed, jnp.uint32))) == published
    draw = np.random.default_rng(0).integers(0, WORD, (7, 16), np.uint32)
    seeds = draw[0, :3]
    expected = [[python_murmur3([int(w) for w in row], int(seed)) for seed in seeds] for row in draw]
    np.testing.assert_array_equal(hashed(jnp.asarray(draw)[:, None], jnp.asarray(seeds)), expected)


def addresses(x, **options):
    found = HashAddressing(MemoryOptions(addressing="hash", **options), rngs=nnx.Rngs(3))
    return np.asarray(jax.jit(lambda x: found(x).ids)(x)).reshape(len(x[0]), -1)


def test_slots_are_uniform_and_reads_independent():
    """Of normal codes and of keys that differ in few bits, as frozen signs do."""
    bits = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=13)))
    for x in (normal(2**13, 16), bits):
        ids = addresses(x[None], memory_slots=36, memory_topk=3)
        for hits, cells in (
            *((ids[:, k], 36) for k in range(3)),
            *((36 * ids[:, a] + ids[:, b], 36**2) for a, b in ((0, 1), (1, 2))),
        ):
            counts, expected = np.bincount(hits, minlength=cells), len(ids) / cells
            assert len(counts) == cells
            assert 1e-4 < chi2.sf(((counts - expected) ** 2 / expected).sum(), cells - 1) < 1 - 1e-4


def test_a_read_is_the_sum_of_the_rows_its_hashes_name():
    x = normal(2, 5, 8).at[1, 0, 0].set(-0.0)
    for weights, share in (("none", 1.0), ("softmax", 1 / 6)):
        options = MemoryOptions(
            addressing="hash", read_weights=weights, memory_slots=25, memory_heads=2, memory_topk=3, value_width=4
        )
        memory = ProductKeyMemory(2, 8, options, rngs=nnx.Rngs(1))
        share = share * 2 if weights == "softmax" else share  # heads are summed
        words = np.asarray(x + 0.0).reshape(10, 8).view(np.uint32)
        assert words[5, 0] == 0
        seeds = [int(seed) for seed in memory.address.seeds[...]]
        ids = np.asarray([[python_murmur3([int(w) for w in row], seed) % 25 for seed in seeds] for row in words])
        values = np.asarray(memory.values.rows[...], np.float64)
        read = jax.jit(lambda x, memory=memory: memory(x))(x)
        np.testing.assert_array_equal(read.slots, ids)
        np.testing.assert_allclose(read.y.reshape(10, 4), share * values[ids].sum(axis=1), rtol=1e-5, atol=1e-6)

        graph, state = nnx.split(memory)
        grads = jax.jit(jax.grad(lambda s, graph=graph: nnx.merge(graph, s)(x).y.sum(), allow_int=True))(state)
        rows = grads["values"]["rows"][...]
        hits = np.bincount(ids.reshape(-1), minlength=25)
        np.testing.assert_allclose(rows, share * np.broadcast_to(hits[:, None], rows.shape), rtol=1e-5)
        assert not np.asarray(jax.jit(jax.grad(lambda x, memory=memory: memory(x).y.sum()))(x)).any()
    memory.fold()


def test_closed_forms_equal_the_program():
    """No query, no keys, no product beside the read itself and the sum of its gradient."""
    schema, config = reference_schema(), dict(tokens=4, width=16, hidden=24, memory_slots=49, memory_topk=4, layers=1)
    counted = count("hash_table", schema, config)
    assert tree_params(abstract_model("hash_table", schema, config)) == counted.dense_params
    assert (
        counted.active_params == count("rankmixer", schema, dict(tokens=4, width=16, hidden=24, layers=1)).dense_params
    )
    function, arguments = forward_program("hash_table", schema, config, 2, 3)
    expected = 2 * counted.forward_flops_user + 6 * counted.forward_flops_candidate + counted.forward_flops_step
    assert count_flops(function, *arguments) == expected
    function, arguments = train_program("hash_table", schema, config, 1, 1)
    assert count_flops(function, *arguments) == counted.train_flops_per_row + counted.train_flops_step


def test_what_a_hash_has_no_use_for_is_refused():
    for message, options in (
        ("theta is 'right_dxd' and has no effect: a hash", dict(theta="right_dxd")),
        ("key_width is 4 and", dict(key_width=4)),
        ("score is 'tucker' and", dict(score="tucker")),
    ):
        with pytest.raises(ValueError, match=message):
            freeze_config("hash_table", options)
    for name in ("msn", "lmn"):
        with pytest.raises(ValueError, match=f"{name}'s .* trained, so a hash of them is no address"):
            freeze_config(name, dict(addressing="hash"))


def test_training_refuses_a_hash_of_what_it_trains():
    config = get_config("hash_table")
    with pytest.raises(ValueError, match="set model.tokenizer to 'identity'.*set training.embedding_lr to 0"):
        check_settings(config)
    config.model.update(tokenizer="identity", norm=None, layers=1)
    config.training.embedding_lr = 0.0
    check_settings(config)
