#!/usr/bin/env bash
# Builds the CUDA kernels for the CPU, without torch's libraries or Python, and runs their cases: in forward, reverse and
# shuffled order of threads, under ASan + UBSan, and under TSan, which sees races.
# With an nvcc also what a GPU would run: ptx is nvcc's own code of the kernels, translated to C++ (tests/ptx), and
# ptx-address the same under ASan; ARCH says for which GPUs.
# Arguments: the configurations to run; plain, address and thread by default. STEMS names some of the kernels' sources, CSRC
# another source tree, BUILD another folder for objects, and with BUILD_ONLY nothing is run (mutate.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
csrc=${CSRC:-$PWD/csrc}
torch=$("${PYTHON:-python3}" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
configurations=("$@")
[[ $# -gt 0 ]] || configurations=(plain address thread)
arch=${ARCH:-90}
if [[ " ${configurations[*]}" == *" ptx"* ]]; then
  nvcc=${CUDACXX:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
  [[ -x $nvcc ]] || nvcc=$(command -v nvcc) || { echo "no nvcc: set CUDA_HOME or CUDACXX" >&2; exit 2; }
fi
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
    ptx) orders=(0 1 7) ;;
    ptx-address) sanitize=(-fsanitize=address -fno-omit-frame-pointer) ;;
    *) echo "unknown configuration: $configuration" >&2; exit 2 ;;
  esac
  [[ $configuration == plain || $configuration == ptx ]] && sanitize=()
  flags+=("${sanitize[@]}")
  [[ -z ${BUILD_ONLY:-} ]] || flags+=(-w -g0) # a fault may leave a variable unused

  # the headers are few and all sources include most of them: one change rebuilds a configuration
  build=${BUILD:-build/emu}/$configuration
  [[ $configuration != ptx* ]] || build+=-$arch
  mkdir -p "$build"
  newest=$(find "$csrc" tests/emu tests/ptx -name '*.h' -newer "$build/stamp" 2>/dev/null || true)
  [[ -e $build/stamp && -z $newest ]] || rm -f "$build"/*.o
  touch "$build/stamp"
  jobs=()
  compile() { # object source flags...
    [[ $1 -nt $2 ]] || { "${CXX:-g++}" "${flags[@]}" "${@:3}" -x c++ -c "$2" -o "$1"; }
  }
  # The host's half is nvcc's, as for a GPU; it finds the other half translated, and tests/ptx/runtime.cpp for a runtime.
  translate() { # object source
    local keep=$build/keep/$(basename "$2") stem
    stem=$(basename "$2" .cu)
    [[ ! $1 -nt $2 || ! $1 -nt tests/ptx/translate.py ]] || return 0
    mkdir -p "$keep"
    "$nvcc" -c -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden -gencode "arch=compute_$arch,code=compute_$arch" --keep --keep-dir "$keep" \
      -isystem "$torch/include" "$2" -o "${1%.o}.host.o"
    "${PYTHON:-python3}" tests/ptx/translate.py "$keep/$stem.ptx" "$keep/$stem.translated.cpp"
    # rounded as on a GPU: nothing fused that is not fused there, nothing computed before it runs
    "${CXX:-g++}" -std=c++17 -O1 -w -fPIC -ffp-contract=off -frounding-math -mfma "${sanitize[@]}" -Itests/ptx \
      -c "$keep/$stem.translated.cpp" -o "$1"
  }
  stems=(${STEMS:-$(basename -s .cu "$csrc"/cuda/*.cu)})
  cases=(main "${stems[@]}")
  [[ $configuration == ptx* ]] || cases+=(self_test)
  for stem in "${stems[@]}"; do
    if [[ $configuration == ptx* ]]; then
      translate "$build/$stem.cu.o" "$csrc/cuda/$stem.cu" & jobs+=($!)
    else
      compile "$build/$stem.cu.o" "$csrc/cuda/$stem.cu" & jobs+=($!)
    fi
  done
  for stem in "${cases[@]}"; do compile "$build/$stem.cpp.o" "tests/emu/$stem.cpp" & jobs+=($!); done
  if [[ $configuration == ptx* ]]; then
    [[ $build/scheduler.o -nt tests/ptx/runtime.cpp ]] ||
      "$nvcc" -c -std=c++17 -O1 "${sanitize[@]/#/-Xcompiler=}" -Xcompiler=-fPIC,-Wall,-Wextra,-Werror,-mf16c tests/ptx/runtime.cpp -o "$build/scheduler.o" & jobs+=($!)
  else
    compile "$build/scheduler.o" "$csrc/emu/cuda_emu.cpp" "${scheduler_flags[@]}" & jobs+=($!)
  fi
  for job in "${jobs[@]}"; do wait "$job"; done
  objects=("$build/scheduler.o")
  for stem in "${cases[@]}"; do objects+=("$build/$stem.cpp.o"); done
  for stem in "${stems[@]}"; do
    objects+=("$build/$stem.cu.o")
    [[ $configuration != ptx* ]] || objects+=("$build/$stem.cu.host.o")
  done
  "${CXX:-g++}" "${sanitize[@]}" "${objects[@]}" -o "$build/main"
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
