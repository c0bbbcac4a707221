"""What an error is about, in place of how it says so. Full messages, as a user reads them, are in tests/cases."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mdpo.errors import DropPair, UserError


@contextmanager
def refused(key: str, *details, kind: type[Exception] = UserError) -> Iterator[pytest.ExceptionInfo]:
    """Its body ends in an error of exactly this `kind` and `key`, whose message has each detail in it: a value, a row,
    a file, a number or the name of another key (data, not wording)."""
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind, f"a {type(error).__name__}: {error}"
    assert error.key == key, f"the key is {error.key!r}: {error}"
    missing = [str(detail) for detail in details if str(detail) not in str(error)]
    assert not missing, f"{missing} not in: {error}"


def dropped(key: str, *details):
    """`refused` for the reason of a DropPair."""
    return refused(key, *details, kind=DropPair)


def is_reason(reason: str, key: str, *details) -> None:
    """The reason under which a row is counted as dropped is of this key, and has each detail in it."""
    with dropped(key, *details):
        raise DropPair(reason)
