#!/usr/bin/env bash
# Everything that needs a GPU: all tests with the CUDA kernels required, memcheck and racecheck of the ops' small cases,
# graphs and streams, and the benchmarks of ops and methods on the GPU, with the tables made of them. Goes on after a failed stage and fails at the end with the list. One
# stage: tests/gpu.sh tests. Several: tests/gpu.sh memcheck racecheck. `make gpu` sets everything up first; on a machine
# that has a torch with CUDA and what requirements/ lists, PYTHON=python3 bash tests/gpu.sh builds in place with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-$PWD/.venv}
python=$(command -v "${PYTHON:-$VENV/bin/python}")
PATH="$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
# cuBLAS is deterministic, as the tests ask torch to be, only with a workspace of its own
export PATH PYSAL_REQUIRE=cpu,cuda CUBLAS_WORKSPACE_CONFIG=:4096:8
only=("$@")
results=()
failed=()

# stage NAME COMMAND...: runs it unless other stages were asked for; a failed one is remembered.
stage() {
  local name=$1 start=$SECONDS verdict=ok status=0
  shift
  [[ ${#only[@]} -eq 0 || " ${only[*]} " == *" $name "* ]] || return 0
  printf '\n===== %s: %s\n' "$name" "$*"
  # in a child of its own: `set -e` stays in force inside a function only when its caller does not test its status
  set +e
  (set -euo pipefail; "$@")
  status=$?
  set -e
  if [[ $status -ne 0 ]]; then verdict="FAILED ($status)"; failed+=("$name"); fi
  results+=("$(printf '%-10s %5d s  %s' "$name" $((SECONDS - start)) "$verdict")")
}

# Compiled by make setup, unless nvcc was not found then or this Python is another one.
build() {
  "$python" -c 'import pysal, sys; sys.exit(pysal.build_info()["cuda"] != "loaded")' ||
    PYSAL_CUDA=ON "$python" setup.py --quiet build_ext --inplace
}

device() {
  nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
  "$python" - <<'PY'
import torch

import pysal

info = pysal.build_info()
print({key: value for key, value in info.items() if key != "kernels"})
if not torch.cuda.is_available():
    raise SystemExit(f"torch {torch.__version__} sees no CUDA device")
if info["cuda"] != "loaded":
    raise SystemExit(f"the CUDA kernels are {info['cuda']}: nvcc of torch's major version {torch.version.cuda} is needed")
reference = [op for op, kernels in info["kernels"].items() if kernels["cuda"] != "native"]
if reference:
    raise SystemExit(f"no CUDA kernel of {', '.join(reference)}")
PY
}

# The comparisons with the oracle, every layout and empty inputs, on CUDA alone; each tensor an allocation of its own, so
# that a read past one's end is not inside the next.
sanitizer() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer: it comes with the CUDA toolkit" >&2; return 2; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 --launch-timeout 600 \
    "$python" -m pytest -q -p no:cacheprovider tests/ops --ignore tests/ops/test_cuda_graphs.py \
    -k "cuda and (matches_reference or match_reference or layouts or empty)"
}

results_folder() {
  "$python" -c 'import pysal; print(f"benchmarks/results/{pysal.__version__}")'
}

# For each op and size: median, bytes moved, share of the measured copy bandwidth; beside it the reference, eager and
# compiled.
bench() {
  "$python" -m benchmarks --suite ops -k cuda --with-compile --results "$(results_folder)"
}

# Every method against its peers, in batches of 1 and 32 images and every arithmetic; then the tables, which also show what is
# wrong or missing.
methods() {
  local status=0
  "$python" -m benchmarks --device cuda --results "$(results_folder)" || status=$?
  "$python" -m benchmarks.tables
  return $status
}

stage build build
stage device device
if [[ ${#failed[@]} -eq 0 ]]; then
  stage graphs "$python" -m pytest -q tests/ops/test_cuda_graphs.py
  stage tests "$python" -m pytest -q tests
  stage memcheck sanitizer memcheck
  stage racecheck sanitizer racecheck
  stage bench bench
  stage methods methods
fi

printf '\n===== summary, %d s\n' "$SECONDS"
printf '%s\n' "${results[@]}"
if [[ ${#failed[@]} -gt 0 ]]; then
  printf 'FAILED: %s\n' "${failed[*]}"
  exit 1
fi
echo "all stages passed"
