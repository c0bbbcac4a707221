"""Multi-turn DPO (M-DPO, arXiv 2409.02392): the stages between a recipe and a trained checkpoint."""

import os
import tempfile

import numpy

if int(numpy.__version__.split(".")[0]) >= 2:
    raise ImportError(
        f"NumPy {numpy.__version__} is installed, but this stack needs numpy<2.0. "
        "Run `pip install 'numpy>=1.26.4,<2.0'`, or `make venv` for an environment with every pin."
    )

# torch makes this folder while it is imported.
_place = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
try:
    os.makedirs(_place or tempfile.gettempdir(), exist_ok=True)
    _why = None if os.access(_place or tempfile.gettempdir(), os.W_OK) else "not permitted"
except OSError as _error:
    _why = _error.strerror
if _why:
    raise ImportError(
        f"TORCHINDUCTOR_CACHE_DIR: {_place} cannot be written to: {_why}. Set it to a folder that can, or unset it."
        if _place
        else f"TMPDIR: there is no folder for temporary files ({_why}). Set TMPDIR to one with room."
    )
