"""Meshes and the rule table that says which array is split over which of their axes."""

from .communication import Lookup, predicted_bytes
from .mesh import MESH_AXES, default_axes, make_mesh, mesh_text, parse_mesh
from .placing import check_requests, own_share, place_batch, put_everywhere, run_mesh
from .rules import (
    BATCH_AXES,
    RULES,
    batch_spec,
    batch_ways,
    lay_out,
    replicated,
    shardings,
    spec,
    split_requests,
    table_spec,
)

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "Lookup",
    "batch_spec",
    "batch_ways",
    "check_requests",
    "default_axes",
    "lay_out",
    "make_mesh",
    "mesh_text",
    "own_share",
    "parse_mesh",
    "place_batch",
    "predicted_bytes",
    "put_everywhere",
    "replicated",
    "run_mesh",
    "shardings",
    "spec",
    "split_requests",
    "table_spec",
]
