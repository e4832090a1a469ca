#!/bin/sh
# make test-versions: install the built wheel beside dependencies of one resolution (lowest-direct or highest), and run
# what a library user relies on from a folder without the checkout.
set -eu
resolution=$1
root=$PWD/build/versions
environment=$root/$resolution

uv venv -q --clear "$environment"
uv pip install -q --python "$environment/bin/python" --resolution "$resolution" -r pyproject.toml \
  --extra gpu --extra model --extra train --extra shards "pytest>=8.3" "pytest-xdist>=3.6" "hypothesis>=6.110"
uv pip install -q --python "$environment/bin/python" --no-deps "$root"/dist/*.whl

rm -rf "$root/tests" && mkdir "$root/tests"
cp -r tests examples pyproject.toml "$root/tests"
cd "$root/tests"
"$environment/bin/python" -c "import llama_smop, sys; print(llama_smop.__file__)" | grep -q site-packages
"$environment/bin/llama-smop" env
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest -n auto --dist loadgroup \
  tests/ops tests/integrations tests/models tests/test_extras.py
