"""Commands that messages advise: as they can be pasted into a shell, whatever the paths in them hold."""

from __future__ import annotations

import shlex


def advised(*words: object) -> str:
    """A command in back-ticks, every word quoted where a shell needs it."""
    return f"`{shlex.join(map(str, words))}`"
