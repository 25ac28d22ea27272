"""The real trainer, on a log whose constants come of few rows; and the same, killed without warning a moment after its
second logging interval, the first time it runs a job."""

import os
import signal
import threading
from pathlib import Path

from recscale.scaling import training
from recscale.scaling.data.known_truth import card

card.card_rows = lambda config: 2**14


def undisturbed(specs, group_dir, **options):
    return training.train_group(specs, group_dir, **options)


def train_group(specs, group_dir, *, progress, cache_dir):
    marker, seen = Path(group_dir) / "killed", []

    def watch(event):
        seen.append(event)
        progress(event)
        if len(seen) == 2 and not marker.exists():
            marker.touch()
            threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()

    return training.train_group(specs, group_dir, progress=watch, cache_dir=cache_dir)
