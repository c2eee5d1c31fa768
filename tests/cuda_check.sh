#!/usr/bin/env bash
# Compiles every CUDA kernel for every architecture with warnings as errors and reads ptxas's report: no kernel may spill
# registers or use a stack frame, and the table of docs/cuda_kernels.md must be current; --write makes it anew. Needs nvcc,
# no GPU. ARCHS="75 90" and PYTHON may be given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvcc=${CUDACXX:-${CUDA_HOME:-/usr/local/cuda}/bin/nvcc}
[[ -x $nvcc ]] || nvcc=$(command -v nvcc) || { echo "no nvcc: set CUDA_HOME or CUDACXX" >&2; exit 2; }
torch=$("${PYTHON:-python3}" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT

targets=()
for arch in ${ARCHS:-75 80 90 100}; do targets+=(-gencode "arch=compute_$arch,code=sm_$arch"); done
sources=(csrc/cuda/*.cu)
# two at a time; xargs fails if one of them does
# shellcheck disable=SC2016  # the inner shell expands them
printf '%s\n' "${sources[@]}" | xargs -P 2 -I{} bash -c '
  "$@" -c "{}" -o /dev/null >"$0/$(basename "{}").txt" 2>&1 || { cat "$0/$(basename "{}").txt"; exit 1; }' \
  "$reports" "$nvcc" -std=c++17 -O3 -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror,-fPIC -Xptxas=-v \
  --threads 2 -isystem "$torch/include" "${targets[@]}"

release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
"${PYTHON:-python3}" tests/cuda_table.py "$reports" "$release" "$@"
