#!/usr/bin/env bash
# The sources with other compilers than GCC for this machine, warnings as errors:
#   syntax    clang reads everything and compiles nothing (a minute)
#   clang     clang compiles everything, and the ops' tests run with what it made
#   aarch64   GCC compiles for 64-bit ARM and links against torch's library for it (a download of 430 MB, once); qemu runs
#             the loops of the CPU (tests/simd_loops.cpp). Ops are not run there: torch for ARM crashes under qemu 7.2.
# All three, or those that are named. PYTHON may be given, CLANG and AARCH64 as names of compilers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
clang=${CLANG:-clang++} aarch64=${AARCH64:-aarch64-linux-gnu-g++}
work=$PWD/build/cross
strict=-DCMAKE_COMPILE_WARNING_AS_ERROR=ON

need() {
  command -v "$1" >/dev/null || { echo "no $1: apt-get install $2" >&2; exit 2; }
}

configure() {
  local target=$1
  shift
  cmake -S . -B "$target" -G Ninja -DPYSAL_PYTHON="$python" -DPYSAL_CUDA=OFF "$strict" -DCMAKE_EXPORT_COMPILE_COMMANDS=ON "$@"
}

syntax() {
  need "$clang" clang
  configure "$work/syntax" --fresh -DCMAKE_CXX_COMPILER="$clang" -DPYSAL_EMU=ON --log-level=WARNING
  "$python" - "$work/syntax/compile_commands.json" <<'PY' | xargs -P "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" -d '\n' -n 1 bash -c
import json, sys

for one in json.load(open(sys.argv[1])):
    print(f"cd {one['directory']} && {one['command']} -fsyntax-only")
PY
  echo "$("$clang" --version | head -1): no warning in $(grep -c '"file"' "$work/syntax/compile_commands.json") files"
}

clang() {
  need "$clang" clang
  local tree=$work/clang/tree
  rm -rf "$tree"
  mkdir -p "$tree"
  # with their times, so that only what changed is compiled again
  git ls-files -z | tar --null --files-from=- --create --file=- | tar --extract --directory="$tree"
  (
    cd "$tree"
    CXX=$clang PYSAL_CUDA=OFF PYSAL_CMAKE_ARGS="$strict -DPYSAL_EMU=ON" \
      "$python" setup.py --quiet build_ext --inplace --build-temp "$work/clang/objects"
    export PYSAL_REQUIRE=cpu,emulated PYTHONPATH=$tree
    "$python" -c 'import pysal; info = pysal.build_info(); print(info["compiler"]); assert "Clang" in info["compiler"]'
    "$python" -m pytest -q -p no:cacheprovider tests/ops tests/engine/test_inverted_residual.py tests/engine/test_smooth_residual.py -m "not slow"
  )
}

aarch64() {
  need "$aarch64" g++-aarch64-linux-gnu
  need qemu-aarch64 qemu-user
  mkdir -p "$work"
  local loops=(csrc/cpu/simd/{box_regions,gaussian_noise,grad_cam,guided_relu}.cpp tests/simd_loops.cpp)
  "$aarch64" -static -std=c++17 -O3 -fno-math-errno -ffp-contract=fast -Wall -Wextra -Werror "${loops[@]}" -o "$work/simd_loops"
  qemu-aarch64 "$work/simd_loops"
  local library=$work/torch/lib/libtorch_cpu.so
  if [[ ! -f $library ]]; then
    # the torch that is installed here, for the other processor; only what is linked against is kept
    local version
    version=$("$python" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])')
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --platform=manylinux_2_28_aarch64 \
      --dest="$work" "torch==$version"
    "$python" -m zipfile -e "$work"/torch-*aarch64.whl "$work/whole"
    mkdir -p "${library%/*}"
    mv "$work/whole/torch/lib/libtorch_cpu.so" "$library"
    rm -rf "$work/whole" "$work"/torch-*.whl
  fi
  configure "$work/aarch64" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$aarch64" \
    -DPYSAL_TORCH_CPU="$library" -DPYSAL_MODULE_SUFFIX=.aarch64.so
  cmake --build "$work/aarch64"
  readelf --file-header "$work"/aarch64/_C*.so | grep -E "File|Machine"
}

stages=("$@")
[[ $# -gt 0 ]] || stages=(syntax clang aarch64)
for stage in "${stages[@]}"; do
  case $stage in
    syntax | clang | aarch64) "$stage" ;;
    *) echo "a stage is syntax, clang or aarch64, got $stage" >&2; exit 2 ;;
  esac
done
