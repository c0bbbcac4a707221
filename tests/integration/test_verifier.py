"""When two answers are the same: mdpo/rollouts/answers.py and its processes, verifier.py."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from mdpo.rollouts import verifier
from mdpo.rollouts.answers import is_right
from mdpo.rollouts.verifier import verified

SAME = [
    ("1/2", r"\frac{1}{2}"), ("0.5", r"\frac{1}{2}"), (r"\dfrac12", "0.5"), ("1,000", "1000"), ("1000", "1,000"),
    (r"1\,000", "1000"), ("1 000 000", "1000000"), ("42", "42.0"), ("42.0", "42"), ("42.", "42"), ("1e3", "1000"),
    ("1.5e-3", "0.0015"), (r"\{1, 2\}", r"\{2, 1\}"), ("1, 2", "2, 1"), ("(1, 2)", "(1,2)"), (r"\$18", "18"),
    (r"18\text{ dollars}", "18"), ("x = 5", "5"), (r"\sqrt{18}", r"3\sqrt{2}"), ("x(x+2)", "x^2+2x"),
    (r"\text{Monday}", "monday"), ("-3", "-3.0"), (r"2\pi", r"\pi \cdot 2"),
]  # fmt: skip
DIFFERENT = [
    ("41", "42"), ("-42", "42"), ("4.2", "42"), ("1/3", "1/2"), ("0.33", r"\frac{1}{3}"), ("10000", "1,000"),
    (r"\{1, 2\}", r"\{1, 3\}"), ("1", "1, 2"), ("1, 2", "1"), ("(1, 2)", "(2, 1)"), ("dog", "god"),
    ("Monday", "Friday"),
    (None, "42"), ("", "42"), ("x", "42"), ("12", "1 2"), ("1/0", "0"), (r"\frac{", "1"), ("true", "1"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same(answer, gold):
    assert is_right(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different(answer, gold):
    assert not is_right(answer, gold)


def test_answers_of_many_threads_are_not_mixed_up():
    """In no more processes than there are cores."""
    verifier.end()
    asked = [(n, n + k) for n in range(40) for k in (0, 1)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda pair: verified(*map(str, pair)), asked))
    assert found == [gold == answer for gold, answer in asked]
    assert 1 <= len(verifier.free) <= len(os.sched_getaffinity(0))


def test_what_comes_to_no_end_is_not_right(monkeypatch):
    """By math-verify's alarm, in a thread; by ours where that does not come, and then another process answers."""
    verifier.end()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(verified, "3", "9^{9^{9^9}}").result() is False
        (child,) = verifier.free
        monkeypatch.setattr(verifier, "SECONDS", 0.5)
        assert thread.submit(verified, "3", "9^{9^{9^9}}").result() is False
        monkeypatch.undo()
        assert thread.submit(verified, "3", "3").result() is True
    assert child.poll() == -signal.SIGKILL and verifier.free != [child]


def test_a_process_that_has_died_is_replaced():
    assert verified("1", "1")
    for child in verifier.free:
        child.kill()
        child.wait()
    assert verified("1", "1")
    verifier.end()
    assert not verifier.free


def test_a_process_that_fails_is_an_error(monkeypatch):
    verifier.end()
    monkeypatch.setattr(verifier.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        verified("1", "1")
