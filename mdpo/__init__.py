"""Multi-turn DPO (M-DPO, arXiv 2409.02392): the stages between a recipe and a trained checkpoint."""

import numpy

if int(numpy.__version__.split(".")[0]) >= 2:
    raise ImportError(
        f"NumPy {numpy.__version__} is installed, but this stack needs numpy<2.0. "
        "Run `pip install 'numpy>=1.26.4,<2.0'`, or `make venv` for an environment with every pin."
    )
