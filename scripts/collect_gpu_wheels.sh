#!/usr/bin/env bash
# Gather what a GPU machine without network needs for the check: wheels for its Python, and the libraries.
#
#   scripts/collect_gpu_wheels.sh [FOLDER]
#
# FOLDER (gpu_wheels, which git ignores) gets the wheels of the packages that the check imports and the machine
# lacks, and cat_fast's libraries, stripped and compressed, which load in any Python and any torch from 2.10 on.
# Needs the environment of `make install`; PYTHON= selects its interpreter, TARGET_PYTHON= the version of the machine (3.12).
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help || $# -gt 1 ]]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
  exit $(($# > 1 ? 2 : 0))
fi
cd "$(dirname "$0")/.."
folder=${1:-gpu_wheels}
python=${PYTHON:-.venv/bin/python}
target=${TARGET_PYTHON:-3.12}
limit=$((62 << 20))

command -v "$python" > /dev/null || { echo "$python was not found: run make install, or set PYTHON" >&2; exit 1; }
mkdir -p "$folder"
"$python" -m benchmarks.gpu.requirements > "$folder/requirements.txt"
while read -r requirement; do
  name=${requirement%%==*}
  if compgen -G "$folder/$(tr - _ <<< "$name")-${requirement##*==}-*.whl" > /dev/null; then
    continue
  fi
  if [[ $name == deepspeed ]]; then # published as sources only
    DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" "$requirement"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
      --python-version "$target" --implementation cp --abi "cp${target/./}" --abi abi3 --abi none \
      --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any "$requirement"
  fi
done < "$folder/requirements.txt"
for library in _ops _ops_cuda; do
  [[ -e cat_fast/$library.abi3.so ]] || { echo "cat_fast/$library.abi3.so is not built: run make build" >&2; exit 1; }
  cp "cat_fast/$library.abi3.so" "$folder/"
  if command -v strip > /dev/null; then
    strip --strip-unneeded "$folder/$library.abi3.so"
  fi
  gzip --best --force "$folder/$library.abi3.so"
done

tracked=$(git ls-files -z | xargs -0 stat --format %s -- 2> /dev/null | awk '{ sum += $1 } END { print sum + 0 }')
gathered=$(find "$folder" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
total=$((tracked + gathered))
awk -v a="$tracked" -v b="$gathered" -v f="$folder" \
  'BEGIN { printf "tracked files %.1f MiB, %s %.1f MiB, together %.1f MiB of 62\n", a / 2^20, f, b / 2^20, (a + b) / 2^20 }'
if ((total > limit)); then
  echo "more than 62 MiB: they do not fit on the check machine" >&2
  exit 1
fi
echo "on the machine: python3 -m benchmarks.gpu_check --out DIR --wheels $folder"
echo "which installs with: CAT_FAST_BUILD=0 pip install --no-index --no-deps --no-build-isolation $folder/*.whl -e ."
