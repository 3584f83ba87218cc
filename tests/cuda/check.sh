#!/usr/bin/env bash
# Run the tests and timings that need a GPU but no Paddle, the most important first.
#
#   tests/cuda/check.sh DIR [LOGS]
#
# DIR is the output of `python -m tools.gpu_bundle`. LOGS is a folder for the output of each part (default: DIR/logs). Each part has a
# timeout. Prints the result and the last lines of each part. Exits with 1 if a part fails or cannot run. tests/cuda/README.md lists
# what to install.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
folder=$(cd "$1" && pwd) || exit 2
logs=${2:-$folder/logs}
mkdir -p "$logs"
export QWENVL_TEST_LIBRARY=$folder/libqwenvl.so QWENVL_LIBRARY=$folder/libqwenvl.so QWENVL_CUDA_KERNELS=$folder
export PYTHONUNBUFFERED=1
failed=0

# Run a part: name, timeout in seconds, number of last output lines to print, command.
part() {
    local name=$1 seconds=$2 lines=$3 start=$SECONDS code=0
    shift 3
    timeout "$seconds" "$@" >"$logs/$name.log" 2>&1 || code=$?
    [ $code = 0 ] || failed=1
    echo "$name: $([ $code = 0 ] && echo passed || echo "exit code $code"), $((SECONDS - start)) s"
    [ $code = 0 ] || lines=$((lines + 15))
    tail -n "$lines" "$logs/$name.log"
}
# Run a part of tests: name, timeout in seconds, test files. Without tests/conftest.py, which needs Paddle (--confcutdir).
pytest_part() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" 1 python3 -m pytest -q --no-header -p no:cacheprovider --confcutdir="${1%/*}" "$@"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
pytest_part decode 60 tests/cuda/test_decode.py
part products 60 20 python3 benchmarks/gpu/products.py
pytest_part small 60 tests/cuda/test_elementwise.py tests/cuda/test_sample.py tests/cuda/test_vision_rows.py
pytest_part adapters 90 tests/cuda/test_low_rank.py
pytest_part prompts 60 tests/cuda/test_prompt_linear.py tests/cuda/test_prompt_attention.py
pytest_part goldens 60 tests/csrc/test_golden_gpu.py
pytest_part same_answer 90 tests/csrc/test_same_answer.py
pytest_part steps 90 tests/csrc/test_engine_step.py tests/csrc/test_engine_generate.py
pytest_part engine_adapters 90 tests/csrc/test_engine_adapters.py
pytest_part refusals 60 tests/csrc/test_engine_errors.py::test_orders_that_a_gpu_refuses
if python3 -c 'import pydantic' 2>/dev/null; then
    pytest_part sampling 60 tests/csrc/test_engine_sampling.py
else # the tests compare with the package's sampler, whose options need pydantic
    echo "sampling: not run, pydantic is missing: pip install pydantic"
    failed=1
fi
part rows 120 40 python3 benchmarks/gpu/ours.py --type bf16
exit $failed
