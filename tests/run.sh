#!/usr/bin/env bash
# All tests, on any machine: bash tests/run.sh [pytest flags]. Installs their requirements into .venv if the active
# environment does not satisfy them; then about 8 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source utils/run/env.sh
use_environment requirements-test.txt

exec "$PYTHON" -m pytest "$@"
