"""Architectures and their modules: arrays in, arrays out. Nothing here trains or reads data; of the other packages it
imports `pallas_kernels` alone.

    from recscale.models import build, count, get_config, list_models        # architectures by name
    from recscale.models import RankMixerBlock, PerTokenFFN, ProductKeyMemory   # modules to build with
    from recscale.models import BackboneSpec, EncoderSpec, RankerSpec        # what a model of one's own registers

Names are loaded on first use, so `import recscale.models` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from recscale.pallas_kernels import __version__ as __version__

if __name__ != "recscale.models":
    raise ImportError("models/ is the package recscale.models: import that, not the folder")

if TYPE_CHECKING:
    from .architecture import BackboneSpec as BackboneSpec
    from .architecture import EncoderSpec as EncoderSpec
    from .architecture import RankerSpec as RankerSpec
    from .baselines.dcnv2 import CrossLayer as CrossLayer
    from .baselines.dcnv2 import DCNv2 as DCNv2
    from .baselines.din import DIN as DIN
    from .baselines.dlrm_mlp import DLRMMLP as DLRMMLP
    from .baselines.hiformer import HiFormer as HiFormer
    from .baselines.hiformer import HiFormerLayer as HiFormerLayer
    from .baselines.hstu import HSTU as HSTU
    from .baselines.hstu import HSTUBlock as HSTUBlock
    from .baselines.mmoe import MMoE as MMoE
    from .baselines.onetrans_lite import OneTransLite as OneTransLite
    from .baselines.sequence_transformer import SASRec as SASRec
    from .baselines.sequence_transformer import SequenceTransformer as SequenceTransformer
    from .baselines.stca import STCA as STCA
    from .baselines.sum_pooling import SumPooling as SumPooling
    from .baselines.target_attention import TargetAttention as TargetAttention
    from .baselines.twin_lite import TwinLite as TwinLite
    from .baselines.wukong import WukongLayer as WukongLayer
    from .counts import Count as Count
    from .counts import Flops as Flops
    from .counts import Params as Params
    from .layers.attention import SelfAttention as SelfAttention
    from .layers.dense import FFN as FFN
    from .layers.dense import MLP as MLP
    from .layers.dense import Dense as Dense
    from .layers.dense import SplitDense as SplitDense
    from .layers.dense import SwiGLU as SwiGLU
    from .layers.history_attention import HistoryBlock as HistoryBlock
    from .layers.history_attention import TargetRead as TargetRead
    from .layers.losses import masked_bce as masked_bce
    from .layers.losses import training_loss as training_loss
    from .layers.mixing import TokenLinear as TokenLinear
    from .layers.mixing import mix as mix
    from .layers.mixing import revert as revert
    from .layers.norms import Norm as Norm
    from .layers.norms import NormOptions as NormOptions
    from .layers.per_token import PerTokenDense as PerTokenDense
    from .layers.per_token import PerTokenFFN as PerTokenFFN
    from .layers.per_token import PerTokenSwiGLU as PerTokenSwiGLU
    from .layers.per_token_moe import PerTokenExperts as PerTokenExperts
    from .layers.per_token_moe import TopKMoE as TopKMoE
    from .layers.quantisation import quantize as quantize
    from .layers.relu_moe import ReLUMoE as ReLUMoE
    from .layers.towers import TowerOptions as TowerOptions
    from .layers.towers import Towers as Towers
    from .memories.lmn import LMN as LMN
    from .memories.memory_mixer import MemoryMixer as MemoryMixer
    from .memories.msn import MSN as MSN
    from .memories.options import MemoryOptions as MemoryOptions
    from .memories.product_key_memory import ProductKeyMemory as ProductKeyMemory
    from .mixers.rankmixer import BlockOptions as BlockOptions
    from .mixers.rankmixer import RankMixer as RankMixer
    from .mixers.rankmixer import RankMixerBlock as RankMixerBlock
    from .mixers.rankmixer_moe import SparseOptions as SparseOptions
    from .mixers.tokenmixer_block import MixedBlockOptions as MixedBlockOptions
    from .mixers.tokenmixer_block import TokenMixerLargeBlock as TokenMixerLargeBlock
    from .mixers.tokenmixer_large import TokenMixerLarge as TokenMixerLarge
    from .mixers.ug_rankmixer import SeparatedRankMixerBlock as SeparatedRankMixerBlock
    from .mixers.ug_rankmixer import UGRankMixer as UGRankMixer
    from .mixers.ug_tokenmixer_large import SeparatedMixedBlock as SeparatedMixedBlock
    from .mixers.ug_tokenmixer_large import UGTokenMixerLarge as UGTokenMixerLarge
    from .options import Options as Options
    from .ranker import Backbone as Backbone
    from .ranker import Composed as Composed
    from .ranker import Ranker as Ranker
    from .ranker import SequenceEncoder as SequenceEncoder
    from .registry import build as build
    from .registry import count as count
    from .registry import default_dtype as default_dtype
    from .registry import freeze_config as freeze_config
    from .registry import get_config as get_config
    from .registry import list_models as list_models
    from .registry import list_presets as list_presets
    from .registry import reads_history as reads_history
    from .registry import size_space as size_space
    from .sequences.ads import ADS as ADS
    from .sequences.hyformer import HyFormer as HyFormer
    from .sequences.longer import Longer as Longer
    from .sequences.mixformer import MixFormer as MixFormer
    from .sequences.mixformer_block import MixFormerBlock as MixFormerBlock

# module -> the names that are loaded from it
_NAMES = {
    "architecture": "BackboneSpec EncoderSpec RankerSpec",
    "counts": "Count Flops Params",
    "options": "Options",
    "ranker": "Backbone Composed Ranker SequenceEncoder",
    "registry": "build count default_dtype freeze_config get_config list_models list_presets reads_history size_space",
    "layers.attention": "SelfAttention",
    "layers.dense": "FFN MLP Dense SplitDense SwiGLU",
    "layers.history_attention": "HistoryBlock TargetRead",
    "layers.losses": "masked_bce training_loss",
    "layers.mixing": "TokenLinear mix revert",
    "layers.norms": "Norm NormOptions",
    "layers.per_token": "PerTokenDense PerTokenFFN PerTokenSwiGLU",
    "layers.per_token_moe": "PerTokenExperts TopKMoE",
    "layers.relu_moe": "ReLUMoE",
    "layers.quantisation": "quantize",
    "layers.towers": "TowerOptions Towers",
    "mixers.rankmixer": "BlockOptions RankMixer RankMixerBlock",
    "mixers.rankmixer_moe": "SparseOptions",
    "mixers.tokenmixer_block": "MixedBlockOptions TokenMixerLargeBlock",
    "mixers.tokenmixer_large": "TokenMixerLarge",
    "mixers.ug_rankmixer": "SeparatedRankMixerBlock UGRankMixer",
    "mixers.ug_tokenmixer_large": "SeparatedMixedBlock UGTokenMixerLarge",
    "memories.lmn": "LMN",
    "memories.memory_mixer": "MemoryMixer",
    "memories.msn": "MSN",
    "memories.options": "MemoryOptions",
    "memories.product_key_memory": "ProductKeyMemory",
    "sequences.ads": "ADS",
    "sequences.hyformer": "HyFormer",
    "sequences.longer": "Longer",
    "sequences.mixformer": "MixFormer",
    "sequences.mixformer_block": "MixFormerBlock",
    "baselines.dcnv2": "CrossLayer DCNv2",
    "baselines.din": "DIN",
    "baselines.dlrm_mlp": "DLRMMLP",
    "baselines.hiformer": "HiFormer HiFormerLayer",
    "baselines.hstu": "HSTU HSTUBlock",
    "baselines.mmoe": "MMoE",
    "baselines.onetrans_lite": "OneTransLite",
    "baselines.sequence_transformer": "SASRec SequenceTransformer",
    "baselines.stca": "STCA",
    "baselines.sum_pooling": "SumPooling",
    "baselines.target_attention": "TargetAttention",
    "baselines.twin_lite": "TwinLite",
    "baselines.wukong": "WukongLayer",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
