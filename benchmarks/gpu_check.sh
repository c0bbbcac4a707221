#!/usr/bin/env bash
# Everything that wants a GPU, in one call: the tests that need one, then benchmarks/gpu_check.py, numbers first, speed
# after; 8 minutes on an 80 GB card.
#   bash benchmarks/gpu_check.sh [PYTHON]      without a GPU it runs through on tiny models, and the tests are skipped
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${1:-.venv/bin/python}"
failed=0
"$PYTHON" -m pytest -m gpu -q -rs tests/integration/test_gpu.py || failed=$?
"$PYTHON" benchmarks/gpu_check.py
exit "$failed"
