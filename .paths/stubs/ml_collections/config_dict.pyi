"""The one function of the submodule that is used: a field of a type that has no value yet."""

from typing import Any

def placeholder(field_type: type, required: bool = False) -> Any: ...
