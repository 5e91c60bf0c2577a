#!/usr/bin/env bash
# Runs the tests from nothing but Python and the package index: makes .venv, installs into it, and calls pytest.
#
#   tests/run.sh [pytest arguments]
#
# Where a checkout of sd-scripts is found ($SD_SCRIPTS_DIR, or ~/.cache/freq_loss_plugin/sd-scripts), its packages are
# installed, too, torchvision among them (several GB), and the tests that train in it run. PYTHON chooses the
# interpreter, VENV another place for the environment.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
sd_scripts=${SD_SCRIPTS_DIR:-$HOME/.cache/freq_loss_plugin/sd-scripts}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
if [ -d "$sd_scripts" ]; then
  "${install[@]}" torch torchvision
  "${install[@]}" -r tests/requirements-sd-scripts.txt
fi
"${install[@]}" --editable '.[test]'
exec "$venv/bin/python" -m pytest "$@"
