"""Forms of scaling laws, by name: `forms.get("kappa")`, `forms.names()`, `forms.describe("chinchilla")`."""

from .form import Form
from .registry import describe, get, names, with_real_floor

__all__ = ["Form", "describe", "get", "names", "with_real_floor"]
