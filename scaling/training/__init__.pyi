"""Public names of `recscale.scaling.training`, for type checkers and for loading each on first use: their one list."""

from .config import get_config as get_config
from .config import group_id as group_id
from .config import resolved as resolved
from .config import run_id as run_id
from .config import shape_id as shape_id
from .config import trunk_id as trunk_id
from .group import RunSpec as RunSpec
from .model_files import load as load
from .runner import train as train
from .runner import train_group as train_group
