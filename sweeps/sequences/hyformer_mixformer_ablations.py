"""Unified models and generated queries at equal dense parameters: the papers' ablations, five paired seeds each.

HyFormer (arXiv 2601.12681), tables 1 and 2: its encoder; what queries are made from; how layers hand on events, queries
and field tokens; against the two-stage models of the same encoders in front of RankMixer.
MixFormer (arXiv 2602.14110), figure 3: query mixer, networks of queries, history and output, norms; and UI-MixFormer.
ADS (arXiv 2502.05523), table 3: three scorers with both generators, without generated queries, without either; queries
shared by chunks of 2, 5 and 10 events.

Every run is sized to one target (ADS to a larger one, on a shorter history), so a change is not also a change of size.
The published gaps are .0002 to .002 AUC on 1e9 samples and more: at this scale a tie is the expected result. The log
has one history, so what separates several (queries that pool their own, merged histories) cannot differ here.

    recscale sweep hyformer_mixformer_ablations --out runs/hyformer_mixformer_ablations

Not run yet at this size: no figure of it has been committed.
"""

from ml_collections import ConfigDict

from recscale.sweeps import Sweep, architectures, axis, by_dense_params, by_history_length, chain, product, seeds
from recscale.sweeps.base import power_law
from recscale.sweeps.sequences.length_ladder import long_log

LENGTH = 256
SIZE = 1.2e5
# Queries are generated per event, so their parameters grow with the history: 2e5 of scorer "can" at this length.
ADS_LENGTH, ADS_SIZE = 64, 3e5


def get_config() -> ConfigDict:
    return long_log("hyformer", LENGTH, examples=400_000, lr=1.5e-3)


def get_sweep() -> Sweep:
    unified = product(chain(_hyformer(), _two_stage(), _mixformer()), by_dense_params([SIZE]))
    return product(
        chain(unified, product(_ads(), by_history_length([ADS_LENGTH]), by_dense_params([ADS_SIZE]))), seeds(5)
    )


def _hyformer() -> Sweep:
    changes = [
        {},
        *axis("model.encoder", ["full", "swiglu"]),
        *axis("model.encoder_causal", [True]),
        *axis("model.encoder_input", ["raw"]),
        *axis("model.query_pools", ["none"]),
        *axis("model.query_sources", ["target"]),
        *axis("model.decode_residual", [False]),
        *axis("model.ns_flow", ["raw"]),
        *axis("model.readout", ["queries"]),
    ]
    # A quarter of the events are the rows of encoder "longer".
    return product(architectures(["hyformer"]), axis("model.keep", [LENGTH // 4]), changes)


def _two_stage() -> Sweep:
    """The encoders of table 1 in front of RankMixer, small enough to leave most of the size to it."""
    longer = product(architectures(["longer+rankmixer"]), axis("model.encoder.merge", [1]))
    longer = product(longer, axis("model.encoder.event_width", [32]), axis("model.encoder.queries", [LENGTH // 4]))
    full = product(architectures(["sequence_transformer+rankmixer"]), axis("model.encoder.width", [32]))
    # The null controls: the history as a sum, and none at all.
    return chain(longer, full, architectures(["sum_pooling+rankmixer", "rankmixer"]))


def _mixformer() -> Sweep:
    changes = [
        {},
        *axis("model.query_mixer", ["self_attention", "none"]),
        *axis("model.query_ffn", [False]),
        *axis("model.history_ffn", ["shared"]),
        *axis("model.output_ffn", ["shared"]),
        *axis("model.norms", ["equations", "post"]),
    ]
    return chain(product(architectures(["mixformer"]), changes), architectures(["ui_mixformer"]))


def _ads() -> Sweep:
    generators = [
        {},
        {"model.encoder.pcrg": False},
        {"model.encoder.pcrg": False, "model.encoder.psrg": False},
    ]
    small = product(architectures(["ads"]), axis("model.encoder.width", [32]), axis("model.encoder.gen_hidden", [8]))
    chunks = product(axis("model.encoder.scorer", ["mha"]), axis("model.encoder.chunk", [2, 5, 10]))
    return product(small, chain(product(axis("model.encoder.scorer", ["mha", "din", "can"]), generators), chunks))


def get_report() -> dict:
    return power_law("dense_params", hold_out=False)
