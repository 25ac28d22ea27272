"""One trainer for all runs that are compiled alike: compiling is most of what a test's run takes."""

import contextlib

import pytest

from recscale.scaling.training import loop, model_files

# Settings of training that decide when runs end, log and save, and nothing of their programs.
_OF_THE_LOOP = ("examples", "log_every_examples", "checkpoint_every_s")


@contextlib.contextmanager
def shared_trainers():
    """Training and loaded models share trainers for so long; gives {what it was made of: trainer}, the oldest first.

    Each gets the data set of whoever asks, so only what is compiled is shared. (What processes of their own share, and
    what not, is for tests of sweeps.)
    """
    made, original = {}, loop.make_trainer

    def make(config, source, replicas, warmup, mesh=None):
        training = {name: value for name, value in config.training.items() if name not in _OF_THE_LOOP}
        sizes = source.requests, source.candidates
        key = repr((config.architecture, config.model, config.data, training, sizes, replicas, warmup, mesh))
        if key not in made:
            made[key] = original(config, source, replicas, warmup, mesh)
        made[key].source = source
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_trainer", make)
        patch.setattr(model_files, "make_trainer", make)
        yield made
