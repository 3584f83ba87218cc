#!/usr/bin/env bash
# Every kernel under compute-sanitizer: memcheck, racecheck and initcheck over a part of the tests that launches each of
# them, all side by side.
#
#   QWENVL_TEST_LIBRARY=DIR/libqwenvl.so QWENVL_CUDA_KERNELS=DIR tests/cuda/sanitize.sh LOGS [SECONDS [TOOL...]]
#
# LOGS is a folder for what each process says; none runs longer than SECONDS (240). Prints a line for each, and exits 1
# unless all are clean. TOOL: memcheck, racecheck, initcheck.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -ge 1 ] || { sed -n 's/^# \{0,1\}//p' "$0" | head -9; exit 2; }
logs=$1 seconds=${2:-240}
shift $(($# < 2 ? $# : 2))
tools=("$@")
[ $# -gt 0 ] || tools=(memcheck racecheck initcheck)
mkdir -p "$logs"

# What a group is called, its tests, and which of them (-k).
groups=(
    "decode_product|tests/cuda/test_decode.py|(float64 and (130-1000-33 or 38-200-3 or 518-2056-9)) or overflow"
    "decode_upload|tests/cuda/test_decode.py|interleaved and 10-72"
    "decode_attention|tests/cuda/test_decode.py|attention and (3-128-32 or 2-18-7)"
    "elementwise|tests/cuda/test_elementwise.py|not 20000 and not 8192 and not 70-"
    "vision_rows|tests/cuda/test_vision_rows.py|not 20000 and not 8192 and not 70-"
    "prompt_product|tests/cuda/test_prompt_linear.py|(odd_sizes and 37-100-120) or (quantised and 77-30-100) or rows_of_x"
    "prompt_attention|tests/cuda/test_prompt_attention.py|(test_prompts and (128-8 or 42-7)) or 1-65-130 or 2-16-16"
    "images|tests/cuda/test_prompt_attention.py|test_images and (2-1024 or 1-256)"
    "sample|tests/cuda/test_sample.py|not 151936 and not distribution and not 5003-256"
    "steps|tests/csrc/test_engine_step.py tests/csrc/test_engine_generate.py|test"
    "golden|tests/csrc/test_golden_gpu.py|test_golden and a-"
    "same_answer|tests/csrc/test_same_answer.py|(bfloat16 or int8 or int4_g64) and not float32 and not float16"
)

check() { # TOOL GROUP TESTS EXPRESSION
    local name=$1-$2 confcutdir=${3%%/test_*}
    # Each tensor of PyTorch's is an allocation of its own: what is beside it is nobody's.
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$seconds" compute-sanitizer --tool "$1" --report-api-errors no \
        --error-exitcode 9 --print-limit 20 python3 -m pytest --confcutdir="$confcutdir" -p no:cacheprovider -q -x \
        $3 -k "$4" >"$logs/$name.log" 2>&1
    local code=$? said
    said=$(grep -E "^[0-9]+ (passed|failed|skipped)|^=+ .*(passed|failed|error)" "$logs/$name.log" | tail -1)
    case $code in
        0) echo "clean    $name: $said" ;;
        124) echo "LATE     $name: $(grep -cE 'Error|WARN|hazard' "$logs/$name.log") reports in $seconds s" ;;
        *) echo "REPORTS  $name ($code): $said; $(grep -E 'SUMMARY' "$logs/$name.log" | tail -1)" ;;
    esac
    [ $code -eq 0 ]
}

pids=()
for tool in "${tools[@]}"; do
    for group in "${groups[@]}"; do
        IFS='|' read -r name tests expression <<<"$group"
        check "$tool" "$name" "$tests" "$expression" &
        pids+=($!)
    done
done
failed=0
for pid in "${pids[@]}"; do
    wait "$pid" || failed=1
done
exit $failed
