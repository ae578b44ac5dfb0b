#!/usr/bin/env bash
# All that needs a GPU, in under ten minutes, from a bare checkout in an environment with torch, setuptools, ninja,
# pytest, pytest-benchmark, hypothesis and matplotlib: build, `pytest -m gpu`, compute-sanitizer on small shapes, kernel
# benchmarks. The encoder table, last, needs what the extra `train` installs.
# The benchmarks write bench/results/<gpu>.{json,md,png}, this script <gpu>.gpu.log and, printed last, <gpu>.gpu.txt.
# `pytest bench/ --benchmark` has more: rows under torch.compile, curves over batch and tokens, pre-training.
# A step that fails does not stop the next; the exit status says whether all passed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
gpu=$($python -c 'import torch; from bench import measure; print(measure.slug(torch.cuda.get_device_name()))') || exit 1
arch=$($python -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}.{b}" + "a" * (a == 9))')
log=bench/results/$gpu.gpu.log
summary=bench/results/$gpu.gpu.txt
mkdir -p bench/results
: > "$log"
{
    echo "$gpu, compute capability $arch, $(date -u +%Y-%m-%dT%H:%MZ)"
    echo "commit $(git describe --always --dirty 2> /dev/null || echo unknown)"
    $python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
    nvcc --version 2> /dev/null | tail -1
} > "$summary"

# step NAME SECONDS COMMAND...: runs it, everything it says to the log, its last line to the summary.
step() {
    local name=$1 limit=$2 begin=$SECONDS status said
    shift 2
    echo "== $name"
    said=$(mktemp)
    timeout "$limit" "$@" > "$said" 2>&1
    status=$?
    {
        echo "== $name"
        cat "$said"
    } >> "$log"
    printf '%-28s %-6s %4d s  %s\n' "$name" "$([[ $status == 0 ]] && echo ok || echo "FAILED")" $((SECONDS - begin)) \
        "$(grep -v '^\s*$' "$said" | tail -n 1)" >> "$summary"
    grep '^launches of' "$said" >> "$summary"
    rm -f "$said"
}

step build 60 env AVF_REQUIRE_NATIVE=1 AVF_CUDA_ARCHS="$arch" $python setup.py -q build_ext --inplace

# Side by side: most of their time goes to compiling Triton kernels, each on one core.
tests="$python -m pytest -q -p no:cacheprovider -m gpu"
step "pytest -m gpu, triton alone" 170 $tests tests/avfkernels/test_triton.py &
step "pytest -m gpu, triton" 170 $tests tests/avfkernels/test_gpu.py -k triton &
step "pytest -m gpu, the others" 170 $tests tests/avfkernels --ignore tests/avfkernels/test_accelerate.py \
    -k "not triton and not launch" &
wait
step "kernel launches" 40 $tests -s tests/avfkernels/test_gpu_launches.py

if sanitizer=$(command -v compute-sanitizer); then
    # Without torch's cache each tensor is an allocation of its own, so that a step beyond one is seen.
    sanitized="$tests tests/avfkernels/test_gpu.py -k"
    for tool in memcheck racecheck; do
        step "$tool" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool $tool --error-exitcode 1 \
            $sanitized "sanitizer and cuda" &
    done
    # The barriers in Triton's kernels are the compiler's: addresses are what can be wrong in ours.
    step "memcheck, triton" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool memcheck --error-exitcode 1 \
        $sanitized "sanitizer and triton" &
    wait
else
    echo "memcheck, racecheck          not run: there is no compute-sanitizer on PATH" >> "$summary"
fi

step "kernel benchmarks" 80 $python -m pytest -q bench/test_{pair,latent,prefix}_attention.py --benchmark
step "encoder table" 130 $python -m pytest -q bench/test_encoder.py --benchmark --no-compile

echo
cat "$summary"
! grep -q ' FAILED ' "$summary"
