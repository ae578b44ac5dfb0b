#!/usr/bin/env bash
# What a GPU says of this code, in one call of at most nine minutes, on a bare machine with torch, triton, timm, einops,
# pytest, pytest-xdist and nvcc. bench/gpu/ measures; each part is a process with a limit, so that what fails or is cut
# short costs nothing but itself. Rows go to ${OUT:-bench/results}/<gpu>-gpu.jsonl as they are made; draw them, on any machine,
# with `python -m bench.report FILE`.
#
#     bench/gpu.sh               all of it
#     bench/gpu.sh --rehearse    every section at toy size on a CPU, in two minutes, to ${OUT:-a temporary folder}
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
parts=(build:70 encoder:130 pretrain:150 variants:60 ops:40 tests:60 sanitizers:25)
if [ "${1:-}" = --rehearse ]; then
    OUT=${OUT:-$(mktemp -d)} CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 AVF_BENCH_TOY=1 \
        exec "$python" -m bench.gpu "${parts[@]%:*}"
fi
export OUT=${OUT:-bench/results}
mkdir -p "$OUT"

status=0
# The most important first: what is cut off is the end.
for part in "${parts[@]}"; do
    timeout --kill-after=5 "${part#*:}" "$python" -m bench.gpu "${part%:*}" --seconds "${part#*:}" 2>> "$OUT/gpu.log" ||
        status=1
done
exit $status
