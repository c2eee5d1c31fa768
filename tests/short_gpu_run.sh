#!/usr/bin/env bash
# What a GPU can say of this package in eight minutes, on a machine without a network: nothing is downloaded there, nothing is
# written but to $OUT and a folder of its own. The stages come in the order in which one would miss them; each has a limit of
# its own and leaves what it found under $OUT at once.
#   at home, once: tests/short_gpu_run.sh pack     -> gpu-run.tar.gz: the tracked files, libraries built with nvcc for the Python
#                  and torch of $PYTHON, which must be those of the other machine, and wheels of what is not torch
#   there:         tar xzf gpu-run.tar.gz; OUT=$PWD/out PYTHON=python3 bash gpu-run/tests/short_gpu_run.sh [stage...]
#   at home again: tests/short_gpu_run.sh tables OUT    -> benchmarks/results, README.md, docs/speed.md
# DEVICE=cpu tries the script itself, in a minute.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 2; }
PATH="$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=PASSIVE CUBLAS_WORKSPACE_CONFIG=:4096:8
# Of the pinned versions; there, what the machine has is left as it is.
wheels=(captum pytest pytest-benchmark py-cpuinfo2 pluggy iniconfig packaging Pygments hypothesis sortedcontainers
  click numpy pillow scipy scikit-image tqdm ImageIO lazy-loader networkx tifffile
  matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil)

# pinned NAME...: what requirements/ says of them; a name that it does not have is an error
pinned() {
  local name
  for name in "$@"; do
    grep --no-filename --ignore-case --max-count=1 "^$name==" requirements/*.txt | head -n 1 | grep . || {
      echo "no $name in requirements/" >&2
      return 1
    }
  done
}

pack() {
  local work
  work=$(mktemp -d)
  mkdir -p "$work/gpu-run"
  git ls-files -z | tar --null --files-from=- --create --file=- | tar --extract --directory="$work/gpu-run" || return
  # compiled without a GPU; the newest architecture's PTX runs on later ones
  (cd "$work/gpu-run" && PYSAL_CUDA=ON "$python" setup.py --quiet build_ext --inplace && rm -rf build) || return
  pinned "${wheels[@]}" >"$work/wheels.txt" || return
  "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/gpu-run/wheels-of-others" --requirement "$work/wheels.txt" || return
  git rev-parse HEAD >"$work/gpu-run/commit"
  tar --create --gzip --file=gpu-run.tar.gz --directory="$work" gpu-run && rm -rf "$work" && ls -l gpu-run.tar.gz
}

tables() {
  "$python" - "$1" <<'PY' && "$python" -m benchmarks.tables && git status --short README.md docs benchmarks/results
import json
import shutil
import sys
from pathlib import Path

import pysal

found = [path for path in sorted(Path(sys.argv[1]).glob("*--*.json")) if json.loads(path.read_text()).get("rows")]
if not found:
    raise SystemExit(f"no results in {sys.argv[1]}")
into = Path("benchmarks/results") / pysal.__version__
for path in found:
    print(shutil.copy(path, into))
PY
}

case ${1:-} in
  pack) pack; exit ;;
  tables) tables "${2:?the folder that came back}"; exit ;;
esac

only=("$@")
DEVICE=${DEVICE:-cuda}
slower=1
[[ $DEVICE != cpu ]] || slower=10 # how busy the machine at home is, is nobody's fault
OUT=${OUT:-$PWD/out-gpu-run} BUDGET=$((${BUDGET:-480} * slower))
mkdir -p "$OUT" || exit
own=$(mktemp -d)
trap 'rm -rf "$own"' EXIT
exec > >(tee -a "$OUT/log.txt") 2>&1

# stage NAME MOST COMMAND...: at most MOST seconds, and not beyond the budget
stage() {
  local name=$1 most=$(($2 * slower)) start=$SECONDS left=$((BUDGET - SECONDS)) status
  shift 2
  [[ ${#only[@]} -eq 0 || " ${only[*]} " == *" $name "* ]] || return 0
  [[ $left -gt 10 ]] || { echo "$name: no time left" | tee -a "$OUT/summary.txt"; return 0; }
  [[ $most -lt $left ]] || most=$left
  printf '\n===== %s, at most %d s\n' "$name" "$most"
  timeout --kill-after=5 "$most" "$@"
  status=$?
  printf '%-10s %4d s  %s\n' "$name" $((SECONDS - start)) "$([[ $status -eq 0 ]] && echo ok || echo "FAILED ($status)")" | tee -a "$OUT/summary.txt"
  return $status
}

# a folder on PYTHONPATH comes before what is installed, so nothing is put there that the machine has, numpy beside torch say
mapfile -t missing < <("$python" - wheels-of-others/*.whl <<'PY'
import importlib.metadata
import sys
from pathlib import Path

for path in map(Path, sys.argv[1:]):
    try:
        importlib.metadata.version(path.name.split("-")[0].replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        if path.exists():
            print(path)
PY
)
if [[ ${#missing[@]} -gt 0 ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$own/site" "${missing[@]}" || echo "not all wheels install"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}:$own/site
load='import pysal, sys; info = pysal.build_info(); print({name: info[name] for name in info if name != "kernels"}); sys.exit(info["cuda"] != "loaded")'
about='import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version()); print(torch.cuda.get_device_properties(0))'
small=()
if [[ $DEVICE == cpu ]]; then
  load=${load/'"loaded"'/'info["cuda"]'} about='import torch; print("torch", torch.__version__)' small=(--side 24 --images 12)
fi
pytest=("$python" -m pytest -q -p no:cacheprovider)
if "$python" -c 'import xdist' 2>/dev/null; then pytest+=(-n "$(($(nproc) < 6 ? $(nproc) : 6))"); fi
# bench_gpu.py as benchmarks/__main__.py runs it
benchmark=("$python" -m pytest -o addopts=--import-mode=importlib -o python_files=bench_*.py -p no:cacheprovider -q --benchmark-only
  --benchmark-columns=median,iqr,rounds -s -rs --results "$OUT")
network() { # stage network images seconds options...: no case begins after so many, or too late to be done within the budget
  local left=$((BUDGET - SECONDS - 20)) until
  until=$(($(date +%s) + ($4 < left ? $4 : left)))
  [[ $DEVICE != cpu ]] || until=1 # which tries the options alone: tests/test_gpu_benchmarks.py runs the rest
  stage "$1" $(($4 + 20)) "${benchmark[@]}" benchmarks/bench_gpu.py --device "$DEVICE" --network "$2" --images "$3" --until $until "${@:5}"
}

stage load 60 "$python" -c "$load" || { echo "the compiled kernels do not load: nothing else would say anything of them"; exit 1; }
stage device 40 "$python" -c "$about"
[[ $DEVICE == cpu ]] || export PYSAL_REQUIRE=cpu,cuda
if [[ $DEVICE == cpu ]]; then
  stage ops 60 "${pytest[@]}" tests/ops/test_guided_relu.py -k "cpu and errors"
else
  stage ops 100 "${pytest[@]}" tests/ops tests/test_on_a_gpu.py -k "cuda and not fuzz" --maxfail 20
fi
unset PYSAL_REQUIRE
stage methods 90 "$python" tests/on_gpu.py methods --device "$DEVICE" --results "$OUT" "${small[@]}"
network resnet50-32 resnet50 32 80
network resnet50-1 resnet50 1 40
network vit-32 vit_small 32 50
if [[ $DEVICE == cpu ]]; then
  stage bench 60 "${benchmark[@]}" benchmarks/bench_ops.py --collect-only
else
  stage bench 50 "${benchmark[@]}" benchmarks/bench_ops.py -k cuda
fi
stage audit 60 "$python" tests/on_gpu.py audit --device "$DEVICE" --results "$OUT" "${small[@]}"
# the peer that takes a minute until it starts
network compile resnet50 1 50 --method integrated_gradients --with-compile
printf '\n===== summary, %d s\n' $SECONDS
cat "$OUT/summary.txt"
! grep -q FAILED "$OUT/summary.txt"
