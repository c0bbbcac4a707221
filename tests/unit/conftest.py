"""Tests of this folder start no process: those that do are in tests/integration."""

import sys

import pytest

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
running = []  # the unit test that runs now


def refuse(event, arguments):
    if running and event in STARTS:
        raise RuntimeError(f"{running[0]} starts a process: a test of tests/integration")


sys.addaudithook(refuse)  # for the whole session: hooks cannot be taken away


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    running.append(item.nodeid)
    try:
        return (yield)
    finally:
        running.clear()
