#!/usr/bin/env bash
# Train a few steps under NVIDIA's profilers; see docs/profiling.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bench/profile.sh [--out NAME] [--ncu REGEX [--launches N]] [flags of train/pretrain.py]

Records training steps 3 to 5, after compilation and warm-up, and then ends the run.

  --out NAME      report file without extension; profile-nsys or profile-ncu by default
  --ncu REGEX     use Nsight Compute instead of Nsight Systems: all counters of the kernels whose name matches
  --launches N    number of launches to record, 5 by default; ncu repeats each several dozen times
  --help          this text

$PYTHON names the interpreter; python by default. Examples:

  bench/profile.sh --preset minimind2-small
  bench/profile.sh --ncu _cross_entropy_kernel --launches 3 --preset minimind2-small
TEXT
}

fail() {
    echo "bench/profile.sh: $1" >&2
    exit 1
}

need() {
    command -v "$1" >/dev/null ||
        fail "$1 is not on PATH: install NVIDIA $2; \`python train/pretrain.py --profile\` works everywhere"
}

value() { # the value of flag $1, from the rest of the arguments
    [[ $# -ge 2 ]] || fail "$1 needs a value; see --help"
    echo "$2"
}

out="" kernels="" launches=5 flags=()
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help | -h) usage; exit ;;
        --out) out=$(value "$@"); shift 2 ;;
        --ncu) kernels=$(value "$@"); shift 2 ;;
        --launches) launches=$(value "$@"); shift 2 ;;
        *) flags+=("$1"); shift ;;
    esac
done

train=("${PYTHON:-python}" "$(dirname "$0")/../train/pretrain.py" --profile --resume never ${flags[@]+"${flags[@]}"})
export MINIMIND_NVTX=1 # spans become NVTX ranges, and the recorded steps a cudaProfilerStart and Stop

if [[ -n $kernels ]]; then
    need ncu "Nsight Compute"
    out=${out:-profile-ncu}
    # --kill: end the run after these launches
    ncu --profile-from-start off --target-processes all --nvtx --set full --kernel-name "regex:$kernels" \
        --launch-count "$launches" --kill yes --force-overwrite --export "$out" "${train[@]}" || status=$?
    [[ -f $out.ncu-rep ]] ||
        fail "ncu wrote no report (status ${status:-0}): no kernel matched '$kernels', or see docs/profiling.md on permissions"
    echo "$out.ncu-rep: open it with ncu-ui, or print it with: ncu --import $out.ncu-rep"
else
    need nsys "Nsight Systems"
    out=${out:-profile-nsys}
    # node: trace the kernels in a CUDA graph one by one. SIGTERM: the trainer ends after its step
    nsys profile --trace=cuda,nvtx,osrt --sample=none --cpuctxsw=none --cuda-graph-trace=node \
        --capture-range=cudaProfilerApi --capture-range-end=stop-shutdown --kill=sigterm \
        --force-overwrite=true --output="$out" "${train[@]}" || status=$?
    [[ -f $out.nsys-rep ]] || fail "nsys wrote no report (status ${status:-0}): did training reach its third step on a GPU?"
    nsys stats --force-export=true --report nvtx_sum,cuda_gpu_kern_sum "$out.nsys-rep"
    echo "$out.nsys-rep: open it with nsys-ui"
fi
