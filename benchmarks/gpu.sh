#!/usr/bin/env bash
# What is worth doing on a GPU, in one call or in parts: build for its architecture, the tests on both
# backends, compute-sanitizer on small shapes, whether it is the same training, the suite in what is left.
#
#     benchmarks/gpu.sh [--dry-run] BUDGET OUT_DIR
#
# BUDGET: seconds for everything. A machine that is lent for half an hour, ten minutes a call, starting it
# included, has time for three of 500: is it right, which form and why, how fast is it.
#
#     FASTNORM_STEPS=build,tests,sanitize,train benchmarks/gpu.sh 500 out
#     FASTNORM_STEPS=build,probe,tune benchmarks/gpu.sh 500 out
#     FASTNORM_STEPS=build,prepare,suite FASTNORM_RUN="--op batch_norm" benchmarks/gpu.sh 500 out
#
# OUT_DIR: gets at most seven files, none in a folder: results.json, summary.txt, training.json and .png,
# probe.json, tune.json, and every log in logs.tar.gz. What fails does not stop the rest, and is named in
# the last lines; the exit status is 1 if anything failed.
# --dry-run: the same on a machine without a GPU, less what needs one: the tests are collected, the small
# shapes and the quick suite run on the CPU.
#
# FASTNORM_STEPS    which of build, tests, sanitize, train, prepare, probe, tune, suite, with commas between
#                   them (all but probe and tune); prepare: tune and suite compile in many processes first
# FASTNORM_RUN      more for `benchmarks run`: "--op batch_norm --providers torch,fastnorm"
# FASTNORM_RESUME   a results.json of this commit and machine, which the suite goes on with
# FASTNORM_PROBE, FASTNORM_TUNE   what they are asked: "--op layer_norm --shape 4096x768", "--op layer_norm
#                   --suite ops" (all probes; the forms of batch norm on every shape)
# FASTNORM_TESTS    which tests, with spaces between them (tests)
# FASTNORM_SUITES   which suites, with commas between them (ops,models,host,rule,
#                   epilogues,kernelbench)
# FASTNORM_COMMIT   the sha that the results name, "-dirty" behind it where files differ; else git is asked
# FASTNORM_WHEELS   a folder of wheels to install before anything else, without a network
# FASTNORM_BUILD_CUDA=0   leave the extension out
# PYTHON            which Python, with torch in it (python3)
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
steps=,${FASTNORM_STEPS:-build,tests,sanitize,train,prepare,suite},
for name in ${steps//,/ }; do
    [[ ,build,tests,sanitize,train,prepare,probe,tune,suite, == *,$name,* ]] ||
        { echo "FASTNORM_STEPS has $name, which is no step" >&2; usage; }
done
wanted() { [[ $steps == *,$1,* ]]; }
top=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
failed=()

left() { echo $((budget - SECONDS > 1 ? budget - SECONDS : 1)); }
share() { # percent of the whole budget, or what is left
    local wanted=$((budget * $1 / 100))
    echo $((wanted < $(left) ? wanted : $(left)))
}
reserve=20 # to start, to end, and for the summary
open=0     # steps that take all the time they get
for name in probe tune suite; do wanted $name && open=$((open + 1)); done
portion() { # of what is left, for one of these: as much as for each that comes after it
    local given=$((($(left) - reserve) / open))
    [ -n "$dry" ] && [ $given -gt 30 ] && given=30
    echo $((given > 1 ? given : 1))
}
pack() { # every log so far: what ends this script before its end leaves them there
    tar c -C "$work" logs | gzip > "$work/logs.tar.gz" && mv "$work/logs.tar.gz" "$out"
}
step() { # log/name, seconds, command: logged, ended when its time is over, never the end of the rest
    local name=${1#*/} log=$work/logs/${1%/*}.log seconds=$2 status
    shift 2
    echo "== $name: up to $seconds s, $(left) s left" | tee -a "$log"
    timeout --signal=INT --kill-after=20 "$seconds" "$@" >> "$log" 2>&1
    status=$?
    tail -n $((status ? 20 : 4)) "$log" | grep -v '^== ' | cut -c 1-200
    if [ $status -ne 0 ]; then
        case $status in
            124 | 137) echo "-- $name: its time was over" ;; # 137: it did not end when asked to
            *) echo "-- $name: exit status $status" ;;
        esac
        failed+=("$name")
    fi
    pack
    return $status
}

# a copy, so that nothing built here stands in the checkout
work=$(mktemp -d)
trap '[ -d "$work/logs" ] && pack; rm -rf "$work"' EXIT
trap 'exit 143' TERM
if [ -z "${FASTNORM_COMMIT:-}" ] && sha=$(git -C "$top" rev-parse HEAD 2> /dev/null); then
    # as benchmarks/environment.py has it: changes, and sources that are new
    [ -z "$(git -C "$top" status --porcelain --untracked-files=no
            git -C "$top" ls-files --others --exclude-standard -- csrc fastnorm benchmarks \
                ':!benchmarks/results' ':!benchmarks/tuning')" ] || sha+=-dirty
    FASTNORM_COMMIT=$sha
fi
export FASTNORM_COMMIT=${FASTNORM_COMMIT:-unknown-dirty}
if [ -n "${FASTNORM_RESUME:-}" ]; then # asked again, of everything else, before it is measured
    grep -q "\"commit\": \"$FASTNORM_COMMIT\"" "$FASTNORM_RESUME" ||
        { echo "FASTNORM_RESUME: $FASTNORM_RESUME is not of commit $FASTNORM_COMMIT" >&2; exit 2; }
    cp "$FASTNORM_RESUME" "$out/results.json" || exit 2
fi
[ -n "${FASTNORM_WHEELS:-}" ] && FASTNORM_WHEELS=$(realpath "$FASTNORM_WHEELS")
mkdir "$work/tree" "$work/site" "$work/logs"
(cd "$top" && tar c --exclude='*.so' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE \
    CHANGELOG.md CONTRIBUTING.md MANIFEST.in Makefile csrc docs fastnorm tests benchmarks) | tar x -C "$work/tree" || exit 1
mkdir -p "$top/build" && ln -s "$top/build" "$work/tree/build" # objects are kept there, by what is in them
cd "$work/tree" || exit 1
export PYTHONPATH="$work/site:$work/tree"
export PATH="$PATH:/usr/local/cuda/bin"
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
capability=$(tail -n 1 "$work/logs/setup.log" | grep -oE '[0-9]+\.[0-9]+$')
if [ -z "$dry" ] && ! grep -q ' [1-9][0-9]* GPUs' "$work/logs/setup.log"; then
    echo "no GPU: torch sees none (--dry-run does what needs none)" >&2
    exit 1
fi
[ -n "$dry" ] && capability=9.0

if ! wanted build || [ "${FASTNORM_BUILD_CUDA:-1}" = 0 ]; then
    echo "== build: left out"
else
    # for this GPU alone, whatever the machine sets; a report of compute-sanitizer then names a line
    [ -n "$dry" ] || export NVCC_APPEND_FLAGS=-lineinfo
    export TORCH_CUDA_ARCH_LIST=$capability FASTNORM_BUILD_CUDA=${dry:+auto}
    export FASTNORM_BUILD_CUDA=${FASTNORM_BUILD_CUDA:-1}
    step setup/build "$(share 35)" "$python" setup.py build_ext --inplace
fi

tests=${FASTNORM_TESTS:-tests} # unquoted below: it may be several
if wanted tests && [ -n "$dry" ]; then
    # in the checkout, where the kernels are compiled for the CPU already: nothing is written there
    for backend in cuda triton; do
        # shellcheck disable=SC2086
        step tests-$backend "$(share 40)" env -C "$top" PYTHONPATH="$work/site:$top" "$python" -m pytest \
            $tests -q --collect-only -p no:cacheprovider -k $backend
    done
elif wanted tests; then
    # as many at once as there are cores, where pytest-xdist is installed, and in the order of tests/conftest.py: what a
    # GPU alone can tell comes first. What takes a minute says where it is
    many=$("$python" -c 'import xdist; print("-n", min(12, __import__("os").cpu_count()), "--maxschedchunk 2")' \
        2> /dev/null)
    many+=" -o faulthandler_timeout=60"
    # shellcheck disable=SC2086
    step tests-cuda "$(share 14)" "$python" -m pytest $tests -q $many -k "cuda and not emulat"
    # shellcheck disable=SC2086
    step tests-triton "$(share 16)" "$python" -m pytest $tests -q $many -k "triton and not aot"
fi
if wanted sanitize && [ -n "$dry" ]; then
    step sanitizer/small "$(share 30)" "$python" -m benchmarks.small --backend reference --device cpu
elif wanted sanitize; then
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

device=cuda suites=${FASTNORM_SUITES:-ops,models,host,rule,epilogues,kernelbench}
tuned="--op batch_norm --suite ops,kernelbench --distinct --knob FORM LAUNCHES"
[ -n "$dry" ] && device=cpu suites=quick tuned="--op activation --shape 4096 --mode forward"
ahead=() # of tune and suite; what runs on a CPU compiles nothing
wanted prepare && [ -z "$dry" ] && ahead=(--prepare "$(share 15)")
trains=10
[ -n "$dry" ] && trains=30
wanted train && step training "$(share $trains)" "$python" -m benchmarks train --device $device \
    --out "$out/training.json" ${dry:+--model vit --steps 2}
measure() { # name of the step, command of benchmarks and its options: in its portion of the time
    local name=$1 command=$2 seconds
    seconds=$(portion)
    shift 2
    if [ "$seconds" -lt 5 ]; then
        echo "== $name: no time left for it"
        failed+=("$name")
    else
        step "$name" $((seconds + reserve - 3)) \
            "$python" -m benchmarks "$command" --device $device --budget "$seconds" "$@"
    fi
    open=$((open - 1))
    # its tables; not how far it was now and then
    [ "$name" = suite ] || grep -vE '^(== |[0-9]+/[0-9]+, )' "$work/logs/$name.log" >> "$out/summary.txt"
}
# shellcheck disable=SC2086
wanted probe && measure probe probe ${FASTNORM_PROBE:-} --out "$out/probe.json"
# shellcheck disable=SC2086
wanted tune && measure tune tune ${FASTNORM_TUNE:-$tuned} "${ahead[@]}" --out "$out/tune.json"
if wanted suite; then
    where=--out
    [ -n "${FASTNORM_RESUME:-}" ] && where=--resume
    # shellcheck disable=SC2086
    measure suite run --suite "$suites" ${FASTNORM_RUN:-} "${ahead[@]}" \
        ${dry:+--note "a dry run, which measures nothing"} $where "$out/results.json"
    "$python" -m benchmarks.summary "$out/results.json" 2>&1 | tee -a "$out/summary.txt"
fi
echo
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]} (see their logs); $SECONDS s in all" | tee -a "$out/summary.txt"
    exit 1
fi
echo "nothing failed; $SECONDS s in all" | tee -a "$out/summary.txt"
