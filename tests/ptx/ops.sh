#!/usr/bin/env bash
# Runs the tests of ops on what a GPU would run: nvcc's code of the kernels, translated to C++, behind the glue that the emulation
# has. Needs nvcc, no GPU. Arguments: stems; all by default. ARCH says for which GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=$(command -v "${PYTHON:-python3}")
torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
[[ $# -gt 0 ]] || set -- $(basename -s .cu csrc/cuda/*.cu)
build=$PWD/build/emu/ptx-${ARCH:-90}
BUILD_ONLY=1 STEMS="$*" PYTHON=$python bash tests/emu/run.sh ptx

objects=("$build/scheduler.o")
tests=()
jobs=()
for stem in "$@"; do
  glue=csrc/cuda/${stem}_op.cpp
  objects+=("$build/$stem.cu.o" "$build/$stem.cu.host.o" "$build/$stem.op.o")
  tests+=("tests/ops/test_$stem.py")
  # as CMakeLists.txt compiles it; 2.11 is the oldest torch that the libraries load in
  [[ $build/$stem.op.o -nt $glue ]] || "${CXX:-g++}" -std=c++17 -O1 -fPIC -DPYSAL_EMU -DTORCH_TARGET_VERSION=0x020b000000000000 \
    -isystem "$torch/include" -c "$glue" -o "$build/$stem.op.o" & jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done
"${CXX:-g++}" -shared "${objects[@]}" -L"$torch/lib" -ltorch_cpu -o "$build/_C_emu.so"
"$python" -m pytest -q -p tests.ptx.plugin --kernels "$build/_C_emu.so" -k emulated "${tests[@]}"
