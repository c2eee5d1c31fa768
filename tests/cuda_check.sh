#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture with warnings as errors and reads ptxas's report: no kernel may spill
# registers or use a stack frame. Needs nvcc, no GPU. ARCHS="80 90" and PYTHON may be given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvcc=${CUDACXX:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
[[ -x $nvcc ]] || nvcc=$(command -v nvcc) || { echo "no nvcc: set CUDA_HOME or CUDACXX" >&2; exit 2; }
torch=$("${PYTHON:-python3}" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

targets=()
for arch in ${ARCHS:-80 90 100}; do targets+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
sources=(csrc/cuda/*.cu)
# two at a time; xargs fails if one of them does
printf '%s\n' "${sources[@]}" | xargs -P 2 -I{} bash -c '
  "$@" -c "{}" -o /dev/null >"$0/$(basename "{}").txt" 2>&1 || { cat "$0/$(basename "{}").txt"; exit 1; }' \
  "$reports" "$nvcc" -std=c++17 -O3 -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror,-fPIC -Xptxas=-v \
  --threads 2 -isystem "$torch/include" "${targets[@]}"

# ptxas prints for each kernel and architecture: "Compiling entry function", "N bytes stack frame, ...", "Used N registers"
awk -v targets="${#targets[@]}" '
  /Compiling entry function/ { kernel = $0; sub(/.*function ./, "", kernel); sub(/. for .*/, "", kernel); arch = $NF; gsub(/[^a-z0-9_]/, "", arch); seen++ }
  /bytes stack frame/ {
    line = $0; gsub(/[^0-9 ]/, " ", line); split(line, n, " ")
    if (n[1] + n[2] + n[3] > 0) { print "spills: " kernel " " arch ": " $0; bad++ }
  }
  /Used [0-9]+ registers/ { match($0, /Used [0-9]+/); used = substr($0, RSTART + 5, RLENGTH - 5) + 0; if (used > most) { most = used; where = kernel " " arch } }
  END {
    printf "%d kernels x architectures, %d with spills or stack; most registers: %d (%s)\n", seen, bad, most, where
    exit seen == 0 || bad > 0
  }' "$reports"/*.txt
