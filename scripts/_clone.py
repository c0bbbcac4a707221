"""Importing this lets `python scripts/x.py` find `mdpo` in a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
