"""Data sources: request-major batches by number, a fixed holdout, and metrics of its logits."""

from .source import DataConfig, Recordable, Source, SourceRequest, Verifiable
from .sources import list_sources, make_source

__all__ = ["DataConfig", "Recordable", "Source", "SourceRequest", "Verifiable", "list_sources", "make_source"]
