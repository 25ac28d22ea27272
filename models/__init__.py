"""Architectures and their modules: arrays in, arrays out. Nothing here trains or reads data; of the other packages it
imports `pallas_kernels` alone.

    from recscale.models import build, count, get_config, list_models        # architectures by name
    from recscale.models import RankMixerBlock, PerTokenFFN, ProductKeyMemory   # modules to build with
    from recscale.models import BackboneSpec, EncoderSpec, RankerSpec        # what a model of one's own registers

Names are listed in `__init__.pyi` and loaded on first use, so `import recscale.models` is cheap.
"""

import lazy_loader

from recscale.pallas_kernels import __version__

if __name__ != "recscale.models":
    raise ImportError("models/ is the package recscale.models: import that, not the folder")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
