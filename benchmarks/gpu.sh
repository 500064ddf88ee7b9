#!/usr/bin/env bash
# Everything worth doing on a GPU, in one call: build for its architecture, the tests on both backends,
# compute-sanitizer on small shapes, whether it is the same training, then the suite in what is left.
#
#     benchmarks/gpu.sh [--dry-run] BUDGET OUT_DIR
#
# BUDGET: seconds for everything; 520 fits a machine that is lent for nine minutes.
# OUT_DIR: gets results.json, training.json, summary.txt and six logs. What fails there does not stop the rest, and
# is named in the last lines; the exit status is 1 if anything failed.
# --dry-run: the same on a machine without a GPU, less what needs one: the tests are collected, the small
# shapes and the quick suite run on the CPU.
#
# PYTHON            which Python, with torch in it (python3)
# FASTNORM_COMMIT   the sha that the results name, "-dirty" behind it where files differ; else git is asked
# FASTNORM_WHEELS   a folder of wheels to install before anything else, without a network
# FASTNORM_TESTS    which tests, with spaces between them (tests)
# FASTNORM_SUITES   which suites, with commas between them (ops,models,host,kernelbench)
# FASTNORM_BUILD_CUDA=0   leave the extension out
set -uo pipefail

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}

dry=
[ "${1:-}" = --dry-run ] && { dry=yes; shift; }
[ $# -eq 2 ] || usage
budget=$1
[[ $budget =~ ^[1-9][0-9]*$ ]] || { echo "BUDGET is $1: it must be a number of seconds" >&2; usage; }
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
[ -z "$(ls -A "$out")" ] || { echo "OUT_DIR $out is not empty: a measurement is never overwritten" >&2; exit 2; }
top=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
failed=()

left() { echo $((budget - SECONDS > 1 ? budget - SECONDS : 1)); }
share() { # percent of the whole budget, or what is left
    local wanted=$((budget * $1 / 100))
    echo $((wanted < $(left) ? wanted : $(left)))
}
step() { # log/name, seconds, command: logged, ended when its time is over, never the end of the rest
    local name=${1#*/} log=$out/${1%/*}.log seconds=$2 status
    shift 2
    echo "== $name: up to $seconds s, $(left) s left" | tee -a "$log"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" >> "$log" 2>&1
    status=$?
    tail -n 4 "$log" | grep -v '^== ' | cut -c 1-200
    if [ $status -ne 0 ]; then
        [ $status -eq 124 ] && echo "-- $name: its time was over" || echo "-- $name: exit status $status"
        failed+=("$name")
    fi
    return $status
}

# a copy, so that nothing built here stands in the checkout
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${FASTNORM_COMMIT:-}" ] && sha=$(git -C "$top" rev-parse HEAD 2> /dev/null); then
    # as benchmarks/environment.py has it: changes, and sources that are new
    [ -z "$(git -C "$top" status --porcelain --untracked-files=no
            git -C "$top" ls-files --others --exclude-standard -- csrc fastnorm benchmarks \
                ':!benchmarks/results' ':!benchmarks/tuning')" ] || sha+=-dirty
    FASTNORM_COMMIT=$sha
fi
export FASTNORM_COMMIT=${FASTNORM_COMMIT:-unknown-dirty}
mkdir "$work/tree" "$work/site"
(cd "$top" && tar c --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE \
    MANIFEST.in csrc fastnorm tests benchmarks) | tar x -C "$work/tree" || exit 1
mkdir -p "$top/build" && ln -s "$top/build" "$work/tree/build" # objects are kept there, by what is in them
cd "$work/tree" || exit 1
export PYTHONPATH="$work/site:$work/tree"
unset TRITON_INTERPRET FASTNORM_BACKEND

device() {
    "$python" - << 'PYTHON'
import torch
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.device_count()} GPUs")
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "%d.%d" % torch.cuda.get_device_capability())
PYTHON
}
export -f device
export python

if [ -n "${FASTNORM_WHEELS:-}" ]; then
    step setup/wheels "$(share 15)" bash -c 'exec "$python" -m pip install -q --no-index --no-deps --no-compile \
        --upgrade --target "$0" "$1"/*.whl' "$work/site" "$FASTNORM_WHEELS"
fi
step setup/machine "$(share 15)" bash -c \
    'nvidia-smi 2> /dev/null || echo "no nvidia-smi"; nvcc --version | tail -n 1; device'
capability=$(tail -n 1 "$out/setup.log" | grep -oE '[0-9]+\.[0-9]+$')
if [ -z "$dry" ] && ! grep -q ' [1-9][0-9]* GPUs' "$out/setup.log"; then
    echo "no GPU: torch sees none (--dry-run does what needs none)" >&2
    exit 1
fi
[ -n "$dry" ] && capability=9.0

if [ "${FASTNORM_BUILD_CUDA:-1}" = 0 ]; then
    echo "== build: left out, FASTNORM_BUILD_CUDA=0"
else
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability} FASTNORM_BUILD_CUDA=${dry:+auto}
    export FASTNORM_BUILD_CUDA=${FASTNORM_BUILD_CUDA:-1}
    step setup/build "$(share 35)" "$python" setup.py build_ext --inplace
fi

tests=${FASTNORM_TESTS:-tests} # unquoted below: it may be several
if [ -n "$dry" ]; then
    # in the checkout, where the kernels are compiled for the CPU already: nothing is written there
    for backend in cuda triton; do
        # shellcheck disable=SC2086
        step tests-$backend "$(share 40)" env -C "$top" PYTHONPATH="$work/site:$top" "$python" -m pytest \
            $tests -q --collect-only -p no:cacheprovider -k $backend
    done
    step sanitizer/small "$(share 30)" "$python" -m benchmarks.small --backend reference --device cpu
else
    # as many at once as there are cores, where pytest-xdist is installed, and in the order of tests/conftest.py: what a
    # GPU alone can tell comes first. What takes a minute says where it is
    many=$("$python" -c 'import xdist; print("-n", min(12, __import__("os").cpu_count()), "--maxschedchunk 2")' \
        2> /dev/null)
    many+=" -o faulthandler_timeout=60"
    # shellcheck disable=SC2086
    step tests-cuda "$(share 14)" "$python" -m pytest $tests -q $many -k "cuda and not emulat"
    # shellcheck disable=SC2086
    step tests-triton "$(share 16)" "$python" -m pytest $tests -q $many -k "triton and not aot"
    sanitize() { # tool, backend, part of its kernels' names, more for benchmarks.small
        # without torch's allocator between them: it would hide the end of a small tensor
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer/$1-$2" "$(share 10)" compute-sanitizer --tool "$1" \
            --error-exitcode 9 --launch-timeout 60 --kernel-name "kns=$3" \
            "$python" -m benchmarks.small --backend "$2" "${@:4}"
    }
    sanitize memcheck cuda fastnorm
    sanitize racecheck cuda fastnorm
    # torch's kernels end as Triton's do; of races those alone that wait for each other
    sanitize memcheck triton _kernel --together
    sanitize racecheck triton _ticket_kernel --together
fi

suites=${FASTNORM_SUITES:-ops,models,host,kernelbench}
device=cuda
[ -n "$dry" ] && suites=quick device=cpu
step training "$(share 10)" "$python" -m benchmarks train --device $device --out "$out/training.json" ${dry:+--model vit --steps 2}
reserve=20 # to start, to end, and for the summary
remaining=$(($(left) - reserve))
[ -n "$dry" ] && [ $remaining -gt 30 ] && remaining=30
if [ $remaining -lt 5 ]; then
    echo "== suite: no time left for it"
    failed+=(suite)
else
    step suite $(($(left) - 3)) "$python" -m benchmarks run --suite "$suites" --device $device \
        --budget $remaining --out "$out/results.json" ${dry:+--note "a dry run, which measures nothing"}
    "$python" -m benchmarks.summary "$out/results.json" 2>&1 | tee "$out/summary.txt"
fi
echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see their logs); $SECONDS s in all" | tee -a "$out/summary.txt"
    exit 1
fi
echo "nothing failed; $SECONDS s in all" | tee -a "$out/summary.txt"
