#!/usr/bin/env bash
# All that needs a GPU, in one call: the tests marked gpu, then benchmarks/gpu_check.py, numerical agreement first, speed
# after; 8 minutes on an 80 GB card.
#   bash benchmarks/gpu_check.sh [PYTHON]      without a GPU: tiny models, and the tests are skipped
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${1:-.venv/bin/python}"
failed=0
"$PYTHON" -m pytest -m gpu -q -rs tests/integration/test_gpu.py || failed=$?
"$PYTHON" benchmarks/gpu_check.py
exit "$failed"
