"""Where pages come from: the folder's templates, every value escaped, a name that is not there an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2


def page_environment() -> jinja2.Environment:
    """A new environment of templates, to be given filters and globals."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def page_parts(name: str) -> Any:
    """A macro of `parts.html.j2`, for blocks, which do not see what their template imports."""
    return getattr(page_environment().get_template("parts.html.j2").module, name)
