#!/usr/bin/env bash
# What has to hold on a machine with a GPU, each in minutes; run it wherever decar and vLLM can be imported.
#   tools/check_gpu.sh kernels       the kernels compiled, and CUDA IPC between two processes
#   tools/check_gpu.sh exact         real engines against the transformers mixture, with vLLM's V1 and V2 model runner
#   tools/check_gpu.sh speed DIR     the kernels against a copy of the same bytes; an ensemble of two 1.2B experts against
#                                    one, without and with MPS, and with decar's sampler; reports go to DIR
# PYTHON=... chooses the interpreter (default: .venv/bin/python, else python3), RUNNERS="1 2" the model runners.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
runners=${RUNNERS:-1 2}
logs=$(mktemp -d)
say() { printf '== %(%T)T %s\n' -1 "$*"; }
check() { "$python" -m pytest -q -p no:benchmark -p no:cacheprovider "$@"; }
v2() { [ "$1" = 2 ] && echo 1 || echo 0; } # of VLLM_USE_V2_MODEL_RUNNER

kernels() {
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(nproc)")
    check "${workers[@]}" tests/kernels tests/server/test_cuda_memory.py
}

# Every server starts in a process of its own, at the same time: a start takes longer than all its tests.
exact() {
    local runner name failed=0 pids=()
    start() { # RUNNER NAME TESTS...
        VLLM_USE_V2_MODEL_RUNNER=$(v2 "$1") OMP_NUM_THREADS=2 check --basetemp "$logs/of V$1 $2" "${@:3}" >"$logs/V$1 $2" 2>&1 &
        pids+=("V$1 $2=$!")
    }
    for runner in $runners; do
        for name in "not trio and not twins" trio twins; do
            start "$runner" "$name" tests/e2e/{test_exact,test_prompts,test_active,test_seeds}.py -k "$name and not gateway"
        done
        [ "$runner" = 1 ] || start "$runner" "selection" tests/e2e/test_v2_runner.py
    done
    for name in "${pids[@]}"; do
        wait "${name#*=}" || failed=1
        say "${name%=*}; engines with V2: $(cat "$logs/of ${name%=*}"/logs*/*.log | grep -c 'Using V2 Model Runner')"
        tail -n 25 "$logs/${name%=*}"
    done
    return $failed
}

speed() {
    local runner output=${1:?a folder for the reports}
    measure() { # WHAT RUNNER
        say "V$2, $1"
        VLLM_USE_V2_MODEL_RUNNER=$(v2 "$2") "$python" -m decar.server bench serve --shape 1B --systems dense \
            --concurrency 1,16,64 --poisson "" --requests 2 --repeats 3 --output "$output/V$2-$1" \
            --vllm '--kv-cache-memory-bytes 2147483648 --gpu-memory-utilization 0.3 --compilation-config {\"mode\":0,\"cudagraph_mode\":\"FULL_DECODE_ONLY\"}'
    }
    say "kernels"
    "$python" -m decar.server bench kernel --output "$output" || return
    for runner in $runners; do
        DECAR_NO_MPS=1 DECAR_SAMPLER=vllm measure without-mps "$runner"
        DECAR_SAMPLER=vllm measure with-mps "$runner"
        measure with-mps-and-decars-sampler "$runner"
    done
}

case "${1:-}" in
kernels | exact | speed) "$@" ;;
*) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
