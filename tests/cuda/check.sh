#!/usr/bin/env bash
# All tests and timings of a machine with a GPU, the most important first.
#
#   tests/cuda/check.sh DIR [LOGS]
#
# DIR is the output of `python -m tools.gpu_bundle`. LOGS is a folder for the output of each part (DIR/logs). Each part has a
# timeout; prints a line for each, and the figures of the timings. Exits 1 unless all passed.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
folder=$(cd "$1" && pwd) || exit 2
logs=${2:-$folder/logs}
mkdir -p "$logs"
export QWENVL_TEST_LIBRARY=$folder/libqwenvl.so QWENVL_LIBRARY=$folder/libqwenvl.so QWENVL_CUDA_KERNELS=$folder
export PYTHONUNBUFFERED=1
bad=0

# Name, seconds, last lines to show, command.
part() {
    local name=$1 seconds=$2 lines=$3 start=$SECONDS code=0
    shift 3
    timeout "$seconds" "$@" >"$logs/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || bad=1
    echo "$name: $([ $code = 0 ] && echo passed || echo "exit code $code"), $((SECONDS - start)) s"
    [ $code = 0 ] || lines=$((lines + 15))
    tail -n "$lines" "$logs/$name.log"
}
tested() { # name, seconds, tests
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" 1 python3 -m pytest -q --no-header -p no:cacheprovider --confcutdir="${1%/*}" "$@"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
tested decode 60 tests/cuda/test_decode.py
part products 60 20 python3 benchmarks/gpu/products.py
tested small 60 tests/cuda/test_elementwise.py tests/cuda/test_sample.py tests/cuda/test_vision_rows.py
tested prompts 60 tests/cuda/test_prompt_linear.py tests/cuda/test_prompt_attention.py
tested goldens 60 tests/csrc/test_golden_gpu.py
tested same_answer 90 tests/csrc/test_same_answer.py
tested steps 90 tests/csrc/test_engine_step.py tests/csrc/test_engine_sampling.py tests/csrc/test_engine_generate.py
part rows 120 40 python3 benchmarks/gpu/ours.py --type bf16
exit $bad
