"""Shared by all tests: the helpers beside them are importable, and randomness is the same in every run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


_exit_status: int | None = None


def pytest_sessionfinish(session, exitstatus):
    global _exit_status
    _exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """Leave without Python's own clean-up once everything has been told.

    The native libraries that sd-scripts brings into this process can crash in it (seen once: a segmentation fault after
    the last of 450 passed tests), which would turn the exit status into that of a failure.
    """
    if _exit_status is None:
        return  # no session: pytest has something to say about its command line
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_exit_status)
