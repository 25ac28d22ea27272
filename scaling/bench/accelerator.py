"""The accelerator of this machine, for measurements that say so where there is none instead of guessing."""

from __future__ import annotations

import jax

from recscale.pallas_kernels.targets import Target, current

NO_ACCELERATOR = (
    "there is no accelerator here, or none that recscale.pallas_kernels.targets knows, so nothing is measured; "
    "`--cpu` runs the small shapes of the XLA paths to prove the harness, and `recscale aot` compiles every kernel"
)


class NoAccelerator(RuntimeError):
    """A measurement needs a device that is not here."""


def accelerator() -> Target:
    """The target of the present device.

    Raises:
        NoAccelerator: it is a CPU, or a device in no table.
    """
    target = current()
    if jax.default_backend() == "cpu" or target is None:
        raise NoAccelerator(NO_ACCELERATOR)
    return target
