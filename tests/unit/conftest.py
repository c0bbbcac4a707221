"""Tests of this folder start no process: those that do are in tests/integration."""

import sys
from pathlib import Path

import pytest

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
running = []  # the unit test that runs now


def refuse(event, arguments):
    if running and event in STARTS:
        raise RuntimeError(f"{running[0]} starts a process: a test of tests/integration")


sys.addaudithook(refuse)  # for the whole session: hooks cannot be taken away


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if item.path.is_relative_to(Path(__file__).parent):  # pytest calls this hook for the items of every folder
        running.append(item.nodeid)
    try:
        return (yield)
    finally:
        running.clear()
