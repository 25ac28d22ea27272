"""The committed run tables and the notes that say what they hold."""

import functools
from pathlib import Path

RUNS = Path(__file__).parents[2] / "notebooks" / "runs"
PAGES = ("README", "quickstart", "mixers", "sequences", "memories", "domains")


@functools.cache
def notes() -> str:
    """All pages of notes, one after the other; a section begins with "## "."""
    return "\n".join((RUNS / f"{page}.md").read_text(encoding="utf-8") for page in PAGES)
