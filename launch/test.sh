#!/usr/bin/env bash
# Installs what is missing, then checks style, spelling, types and behaviour. Arguments go to pytest:
#
#   bash launch/test.sh                     everything that CI runs
#   bash launch/test.sh -m slow             the slow cases
#   bash launch/test.sh tests/train -x      one folder, up to the first failure

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

ruff check .
ruff format --check .
codespell
mypy
pytest "$@"
