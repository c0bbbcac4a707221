"""Tests of this folder start no process: those that do are in tests/integration."""

import sys
from contextlib import contextmanager

import pytest

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
running = []  # the unit test that runs now


def refuse(event, arguments):
    if running and event in STARTS:
        raise RuntimeError(f"{running[0]} starts a process: a test of tests/integration")


sys.addaudithook(refuse)  # for the whole session: hooks cannot be taken away


@contextmanager
def named(item):
    running.append(item.nodeid)
    try:
        yield
    finally:
        running.clear()


# These hooks are called for items of this folder alone; pytest_runtest_protocol would be called for all.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with named(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with named(item):
        return (yield)
