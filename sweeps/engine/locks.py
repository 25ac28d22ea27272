"""One launcher a folder: who works on a sweep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from recscale.scaling.records.locks import Busy, hold, is_held, launch_lock


@contextlib.contextmanager
def only_launcher(out: Path) -> Iterator[None]:
    """Makes this process the only launcher of a folder for as long as the block runs.

    Raises:
        Busy: there is one already; the message names its process.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hold(launch_lock(out)))
        except Busy as error:
            message = f"another launcher ({error.owner}) is working on {out}; wait for it, or stop it and launch again"
            raise Busy(message, error.owner) from None
        yield


def has_launcher(out: Path) -> bool:
    """Whether a launcher is working on a folder right now."""
    return is_held(launch_lock(out))
