"""Training of one run or one group of runs: configuration in, record out.

Names are listed in `__init__.pyi` and loaded on first use, so planning a sweep does not load the checkpointing stack.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
