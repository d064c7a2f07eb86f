#!/bin/bash
# All that wants a GPU, in one call of at most ten minutes:
#
#     tools/gpu_check.sh [--fake] [FOLDER]
#
# Needs torch, pytest, and triton or nvcc; neither vLLM nor pytest-asyncio. What matters most comes
# first; each part has a limit of its own and leaves FOLDER/PART.txt (default: out/gpu-check) as soon
# as it ends. The last line says which parts failed; 0 if none did. --fake: the parts that a fake
# CUDA runtime can do, on any machine. LIMIT: seconds in all (570).
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2
fake=()
if [ "${1:-}" = --fake ]; then fake=(--fake); shift; fi
out=${1:-out/gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD HEXGEN_CACHE_DIR=${HEXGEN_CACHE_DIR:-$out/cache}
began=$SECONDS
failed=()

part() { # name, seconds, command...
  local name=$1 limit=$2 rc at=$SECONDS left=$((${LIMIT:-570} - (SECONDS - began)))
  shift 2
  if [ "$left" -lt 10 ]; then echo "== $name: no time left"; failed+=("$name"); return; fi
  [ "$limit" -gt "$left" ] && limit=$left
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
  rc=$?
  tail -n 12 "$out/$name.txt"
  echo "== $name: rc $rc, $((SECONDS - at)) s"
  [ "$rc" -eq 0 ] || failed+=("$name")
}

# Without the options of pyproject.toml and the conftests: they want plugins that may be missing.
tests=("$python" -m pytest -c /dev/null --rootdir "$PWD" --import-mode=importlib -p no:cacheprovider --noconftest -q -m gpu)

if [ ${#fake[@]} -eq 0 ]; then
  part 1-machine 20 bash -c "nvidia-smi; nvcc --version; nvidia-smi topo -m; $python -c '
import torch; print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'"
  part 2-build 60 "$python" -m hexgen_vllm.kernels.build --out "$out/cache"
  part 3-kernels 150 "${tests[@]}" tests/kernels/test_gpu.py
fi
part 4-races 90 "$python" -m tools.gpu_check races "${fake[@]}" --engines "${ENGINES:-60}" --json "$out/races.json"
part 5-stalls 60 "$python" -m tools.gpu_check stalls "${fake[@]}" --json "$out/stalls.json"
if [ ${#fake[@]} -eq 0 ]; then
  bench=("$python" -m benchmarks.kv.kv --device cuda)
  part 6-sweep 110 "${bench[@]}" --parts sweep --page-kib 8,64,256 --blocks 4,64,512 --layers 32 --json "$out/sweep.json"
  part 7-beside 60 "${bench[@]}" --parts beside break-even --json "$out/beside.json"
  checked=(compute-sanitizer --error-exitcode 9)
  part 8-memcheck 90 "${checked[@]}" --tool memcheck "${tests[@]}" -x tests/kernels/test_gpu.py -k "cuda and (LBHNC or LHBNC or pad=1 or staging)"
  part 9-initcheck 60 "${checked[@]}" --tool initcheck "${tests[@]}" -x tests/kernels/test_gpu.py -k "cuda and staging"
  if "$python" -c 'import vllm' 2>/dev/null; then
    part 10-preempt 200 "$python" -m hexgen_vllm.cli bench preempt --device cuda --json "$out/preempt.json"
  fi
fi
echo "== $((SECONDS - began)) s; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
