#!/usr/bin/env bash
# All tests, on any machine: bash tests/run.sh [pytest flags]. Installs what they need into .venv if the active
# environment lacks it; at most 8 minutes on 2 cores after that.
set -euo pipefail
cd "$(dirname "$0")/.."
source utils/run/env.sh
use_environment requirements-test.txt

exec "$PYTHON" -m pytest "$@"
