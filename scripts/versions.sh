#!/usr/bin/env bash
# The test suite on other versions, in a virtual environment of its own that is removed at the end (8 GB meanwhile).
#
#   scripts/versions.sh CONSTRAINTS [PYTHON [PYTEST ARGUMENTS ...]]
#   scripts/versions.sh constraints-oldest.txt python3.11 -m 'not slow'      the oldest that pyproject.toml allows
#   scripts/versions.sh constraints.txt python3.13                           the newest, on a newer Python
set -euo pipefail
constraints=$(realpath "$1") python=${2:-python3}
shift $(($# < 2 ? $# : 2))
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place"
"$place/bin/python" -m pip install -q --disable-pip-version-check -c "$constraints" -e '.[test,infomap,onnx]'
"$place/bin/python" -m pip freeze --exclude-editable | grep -iE '^(torch|timm|pytorch-lightning|hydra-core|numpy)=='
OMP_NUM_THREADS=1 "$place/bin/python" -m pytest -q -n 2 --dist loadfile --deselect tests/test_wheel.py "$@"
