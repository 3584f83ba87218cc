#!/usr/bin/env bash
# Run tests of most kernels under compute-sanitizer, with each TOOL (default: memcheck racecheck initcheck).
#
#   QWENVL_TEST_LIBRARY=DIR/libqwenvl.so QWENVL_CUDA_KERNELS=DIR tests/cuda/sanitize.sh LOGS [SECONDS [TOOL...]]
#
# DIR: folder of tools.gpu_bundle (README.md). LOGS: folder for the output of each process, which has a timeout of
# SECONDS (default: 240). At most one runs per CPU core. Prints a line for each; exits with 1 unless all are clean.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
logs=$1 seconds=${2:-240}
shift $(($# < 2 ? $# : 2))
tools=("$@")
[ $# -gt 0 ] || tools=(memcheck racecheck initcheck)
mkdir -p "$logs"

# Name of a group | test file | selection of tests (pytest -k).
groups=(
    "decode_narrow|tests/cuda/test_decode.py|(float64 and 38-200-3) or overflow"
    "decode_wide|tests/cuda/test_decode.py|float64 and 130-1000-33"
    "decode_upload|tests/cuda/test_decode.py|interleaved and 10-72"
    "decode_attention|tests/cuda/test_decode.py|attention and 3-128-32"
    "decode_attention_odd|tests/cuda/test_decode.py|attention and (2-18-7-2 or 1-256-32-1 or 3-64-7-5)"
    "elementwise|tests/cuda/test_elementwise.py|(rms and (3-100 or 3-4099)) or (embed and 4099) or 3-128-7 or 3-2-5 or int8_without or gather"
    "low_rank|tests/cuda/test_low_rank.py|test_rows_of_several and 75"
    "vision_rows|tests/cuda/test_vision_rows.py|cut or add_rows or (layer_norm and (3-100 or 3-4096))"
    "prompt_product_bf16|tests/cuda/test_prompt_linear.py|odd_sizes and 37-100-120 and -bf16"
    "prompt_product_f16|tests/cuda/test_prompt_linear.py|odd_sizes and 37-100-120 and -f16"
    "prompt_quantized|tests/cuda/test_prompt_linear.py|(quantized and 77-30-100) or rows_of_x"
    "prompt_attention_bf16|tests/cuda/test_prompt_attention.py|test_prompts and (128-8 or 42-7 or 256-3) and (int8-bf16 or bfloat16-bf16)"
    "prompt_attention_f16|tests/cuda/test_prompt_attention.py|test_prompts and (128-8 or 42-7 or 256-3) and (float32-f16 or float16-f16)"
    "images|tests/cuda/test_prompt_attention.py|test_images and (1-65-130 or 2-16-16 or 3-7-5)"
    "images_104|tests/cuda/test_prompt_attention.py|test_images and 2-1024"
    "images_128|tests/cuda/test_prompt_attention.py|test_images and 1-256"
    "sample|tests/cuda/test_sample.py|(tokens and (77-34-3 or 640-119-3)) or (most_likely and 5003-2) or ((equal or few) and 640) or nan-slice"
    "sample_large|tests/cuda/test_sample.py|(tokens and 151936-34-3) or (most_likely and 151936-2)"
    "steps|tests/csrc/test_engine_step.py|test"
    "generate|tests/csrc/test_engine_generate.py|test"
    "golden|tests/csrc/test_golden_gpu.py|test_golden and a-"
)

check() { # TOOL GROUP TESTS EXPRESSION
    local name=$1-$2 confcutdir=${3%%/test_*}
    # Each PyTorch tensor is a separate allocation, so that accesses beyond it are out of bounds. --confcutdir: without
    # tests/conftest.py, which needs Paddle. --report-api-errors no: the engine looks up a kernel in one of its modules
    # after the other, and the lookups before the right one fail.
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$seconds" compute-sanitizer --tool "$1" --report-api-errors no \
        --error-exitcode 9 --print-limit 20 python3 -m pytest --confcutdir="$confcutdir" -p no:cacheprovider -x \
        $3 -k "$4" >"$logs/$name.log" 2>&1
    local code=$? summary
    summary=$(grep -E "(passed|failed|skipped|deselected)" "$logs/$name.log" | tail -1)
    case $code in
        0) echo "clean    $name: $summary" ;;
        124) echo "LATE     $name: $(grep -cE '^=+ +(Error|Warning|Invalid|Uninit)' "$logs/$name.log") reports in $seconds s" ;;
        *) echo "REPORTS  $name ($code): $summary; $(grep -E 'SUMMARY' "$logs/$name.log" | tail -1)" ;;
    esac
    [ $code -eq 0 ]
}

max_processes=$(nproc) pids=()
for tool in "${tools[@]}"; do
    for group in "${groups[@]}"; do
        IFS='|' read -r name tests expression <<<"$group"
        while [ "$(jobs -rp | wc -l)" -ge "$max_processes" ]; do sleep 0.2; done
        check "$tool" "$name" "$tests" "$expression" &
        pids+=($!)
    done
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
exit $failed
