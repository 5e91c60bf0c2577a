"""Finding the running trainer keeps nothing of it alive: a trainer deletes its text encoder to free its memory."""

from __future__ import annotations

import argparse
import gc
import sys
import weakref

import pytest

from kohya_patch import startup
from kohya_patch.frames import callers_named, local_variables
from kohya_patch.sd_scripts.trainers import TrainingRun


class Large:
    """Stands for a text encoder."""


class NetworkTrainer:
    """A trainer like that of sd-scripts: what it deletes is still in its frame's snapshot if somebody made one."""

    def train(self, args, look):
        text_encoder, train_dataset_group = Large(), argparse.Namespace(datasets=["data"])
        gone = weakref.ref(text_encoder)
        found = look()
        del text_encoder
        gc.collect()
        kept = gone() is not None
        return kept, found, train_dataset_group, args


def look_at_startup():
    return startup._is_asked_for(next(callers_named("train")))


@pytest.mark.parametrize("look", [TrainingRun.find, look_at_startup])
def test_what_the_trainer_deletes_is_gone(look):
    args = argparse.Namespace(network_module="kohya_patch")
    trainer = NetworkTrainer()
    kept, found, group, same_args = trainer.train(args, look)
    assert not kept
    assert same_args is args  # its other variables are what they were
    assert group.datasets == ["data"]
    if look is look_at_startup:
        assert found
    else:
        assert (found.trainer, found.args, found.datasets) == (trainer, args, ("data",))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python makes no snapshot")
def test_reading_them_without_care_would_keep_it():
    """The fault that the test above is for."""
    kept, *_ = NetworkTrainer().train(argparse.Namespace(), lambda: sys._getframe(1).f_locals["self"])
    assert kept


def test_variables_of_a_class_or_module_are_left_alone():
    namespace = {"local_variables": local_variables, "sys": sys}
    exec(
        "x = 1\nclass Body:\n    y = 2\n    found = local_variables(sys._getframe(), 'y')\n    z = y\n"
        "outer = local_variables(sys._getframe(), 'x', 'none')\n",
        namespace,
    )
    assert namespace["outer"] == [1, None]
    assert (namespace["Body"].found, namespace["Body"].z, namespace["x"]) == ([2], 2, 1)
