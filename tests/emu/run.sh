#!/usr/bin/env bash
# Builds the CUDA kernels for the CPU, without torch's libraries or Python, and runs their cases: in forward, reverse and
# shuffled order of threads, under ASan + UBSan, and under TSan, which sees races.
# Arguments: the configurations to run (plain, address, thread); all by default. CSRC names another source tree,
# BUILD another folder for objects, and with BUILD_ONLY nothing is run (mutate.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
csrc=${CSRC:-$PWD/csrc}
torch=$("${PYTHON:-python3}" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
configurations=("$@")
[[ $# -gt 0 ]] || configurations=(plain address thread)
export ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS="exitcode=66 halt_on_error=1" UBSAN_OPTIONS=print_stacktrace=1

for configuration in "${configurations[@]}"; do
  flags=(-std=c++17 -O1 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas -fno-strict-aliasing -DPYSAL_EMU
    -isystem "$torch/include" "-ffile-prefix-map=$PWD/=")
  orders=(0)
  scheduler_flags=()
  case $configuration in
    plain) orders=(0 1 7 8) ;;
    address) sanitize=(-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer) ;;
    thread)
      sanitize=(-fsanitize=thread)
      scheduler_flags=(-fno-sanitize=thread -DPYSAL_EMU_TSAN)
      ;;
    *) echo "unknown configuration: $configuration" >&2; exit 2 ;;
  esac
  [[ $configuration == plain ]] && sanitize=()
  flags+=("${sanitize[@]}")
  [[ -z ${BUILD_ONLY:-} ]] || flags+=(-w -g0) # a fault may leave a variable unused

  # the headers are few and all sources include most of them: one change rebuilds a configuration
  build=${BUILD:-build/emu}/$configuration
  mkdir -p "$build"
  newest=$(find "$csrc" tests/emu -name '*.h' -newer "$build/stamp" 2>/dev/null || true)
  [[ -e $build/stamp && -z $newest ]] || rm -f "$build"/*.o
  touch "$build/stamp"
  jobs=()
  compile() { # object source flags...
    [[ $1 -nt $2 ]] || { "${CXX:-g++}" "${flags[@]}" "${@:3}" -x c++ -c "$2" -o "$1"; }
  }
  for source in "$csrc"/cuda/*.cu; do compile "$build/$(basename "$source").o" "$source" & jobs+=($!); done
  for source in tests/emu/*.cpp; do compile "$build/$(basename "$source").o" "$source" & jobs+=($!); done
  compile "$build/scheduler.o" "$csrc/emu/cuda_emu.cpp" "${scheduler_flags[@]}" & jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job"; done
  "${CXX:-g++}" "${sanitize[@]}" "$build"/*.o -o "$build/main"
  [[ -z ${BUILD_ONLY:-} ]] || continue

  for order in "${orders[@]}"; do
    echo "--- $configuration, order $order"
    "$build/main" "$order"
  done
  if [[ $configuration == thread ]]; then
    status=0
    "$build/main" race >/dev/null 2>&1 || status=$?
    [[ $status -eq 66 ]] || { echo "TSan does not see a missing barrier: exit status $status" >&2; exit 1; }
  fi
done
