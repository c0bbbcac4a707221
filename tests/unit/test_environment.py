"""Importing mdpo checks NumPy, and says what to do."""

import importlib

import numpy
import pytest

import mdpo


def test_numpy_2_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(numpy, "__version__", "2.1.0")
    with pytest.raises(ImportError, match=r"NumPy 2\.1\.0 .*Run `pip install 'numpy>=1\.26\.4,<2\.0'"):
        importlib.reload(mdpo)
    monkeypatch.undo()
    importlib.reload(mdpo)
