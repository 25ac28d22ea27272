"""What type checkers need to know of submitit, an extra that need not be installed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

class Job:
    job_id: str

class AutoExecutor:
    def __init__(self, folder: str | Path, cluster: str | None = None) -> None: ...
    def update_parameters(self, **kwargs: Any) -> None: ...
    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Job: ...
