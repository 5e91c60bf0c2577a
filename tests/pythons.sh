#!/usr/bin/env bash
# Runs tests/run.sh once with each supported Python that is installed, each in an environment of its own.
#
#   tests/pythons.sh [pytest arguments]
set -uo pipefail
cd "$(dirname "$0")/.."

status=0
for version in 3.10 3.11 3.12 3.13; do
  if "python$version" --version 2>/dev/null; then
    PYTHON=python$version VENV=.venv-$version tests/run.sh "$@" || status=$?
  else
    echo "not run: Python $version is not installed"
  fi
done
exit "$status"
