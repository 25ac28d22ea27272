"""Meshes and the rule table that says which array is split over which of their axes."""

from .mesh import MESH_AXES, default_axes, make_mesh, mesh_text, parse_mesh
from .rules import BATCH_AXES, RULES, batch_spec, batch_ways, replicated, shardings, spec, table_spec

__all__ = [
    "BATCH_AXES",
    "MESH_AXES",
    "RULES",
    "batch_spec",
    "batch_ways",
    "default_axes",
    "make_mesh",
    "mesh_text",
    "parse_mesh",
    "replicated",
    "shardings",
    "spec",
    "table_spec",
]
