"""Processes with several devices on a machine that has one."""

import os


def environment(devices: int, *more: str) -> dict[str, str]:
    """Variables of a process with so many forced CPU devices, and `more` flags of XLA, that compiles like this one."""
    flags = [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={devices}", *more]
    return os.environ | {"XLA_FLAGS": " ".join(flags).strip(), "JAX_PLATFORMS": "cpu"}
