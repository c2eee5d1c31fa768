#!/usr/bin/env bash
# The CPU kernels under ASan + UBSan: builds pysal._C alone, in a copy of the tracked files, and runs the ops' tests
# and those of prepared models' kernels there, fuzz included. PYTHON may be given, and arguments for pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
tree=$PWD/build/sanitize/tree objects=$PWD/build/sanitize/objects
rm -rf "$tree"
mkdir -p "$tree"
# with their times, so that only what changed is compiled again
git ls-files -z | tar --null --files-from=- --create --file=- | tar --extract --directory="$tree"
cd "$tree"
PYSAL_CUDA=OFF PYSAL_CMAKE_ARGS="-DPYSAL_SANITIZE=address,undefined -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
  "$python" setup.py --quiet build_ext --inplace --build-temp "$objects"

# Python is built without ASan, so its runtime must be there first; and libstdc++, for it to find what throws
compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$objects"/*/CMakeCache.txt)
LD_PRELOAD=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libstdc++.so.6)
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export PYSAL_REQUIRE=cpu PYTHONPATH=$tree
"$python" -c 'import pysal; info = pysal.build_info(); print(info["sanitizer"], info["simd"]); assert info["sanitizer"]'
# what ASan writes before it ends the process is not for pytest to hold back
"$python" -m pytest -q -p no:cacheprovider --capture=sys tests/ops tests/engine/test_matrix_unit.py tests/engine/test_inverted_residual.py tests/engine/test_smooth_residual.py tests/engine/test_activations.py tests/engine/test_attention.py \
  -k "cpu or determinism or matrix_unit or inverted_residual or smooth_residual or activations or attention" -m "not slow" "$@"
