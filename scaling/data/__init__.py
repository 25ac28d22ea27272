"""Data sources: request-major batches by number, a fixed holdout, and metrics of its logits."""

from .source import Source
from .sources import list_sources, make_source

__all__ = ["Source", "list_sources", "make_source"]
