#!/usr/bin/env bash
# Which lines the tests run, also those in the ranks that they start. Arguments go to pytest:
#
#   bash launch/coverage.sh tests/optim     prints a table; `coverage html` makes pages of it

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

coverage erase
coverage run -m pytest "$@"
coverage combine --quiet
coverage report
