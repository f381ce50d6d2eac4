#!/usr/bin/env bash
# What to measure on a machine with a GPU, the most telling first. Every part stands alone and ends within 8 minutes.
#
#   benchmarks/gpu_day.sh list          # the parts
#   benchmarks/gpu_day.sh 2             # one part; several: 1 2 3
#   benchmarks/gpu_day.sh --tiny 2      # the same commands with small networks on the CPU, to see that they run
#
# Results go to benchmarks/results/gpu/ (with --tiny nowhere). Teachers with random weights are made once, in $TEACHERS
# (25 GB). Needed: the project's own packages, and a torch with CUDA; gpu_wheels.txt lists the wheels.
set -euo pipefail
cd "$(dirname "$0")/.."

PARTS=(
  "the default run of the embedded world, against the committed numbers of a CPU"
  "SD3.5-Medium at 1024 pixels: memory against the estimate, seconds and share of the card; adapters, then whole networks"
  "ours against the published loop, SD3.5-Medium with adapters at 1024 pixels"
  "compiled networks, and attention kernels, SD3.5-Medium with adapters at 1024 pixels"
  "SDXL at 1024 pixels: as part 2, with adapters"
  "the embedded world's DMD and DP-DMD on five more training seeds"
)
LIMIT=480 # seconds of a part

TINY=
if [ "${1:-}" = --tiny ]; then TINY=1 && shift; fi
if [ $# = 0 ] || [ "$1" = list ]; then
  for i in "${!PARTS[@]}"; do echo "$((i + 1))  ${PARTS[$i]}"; done
  exit 0
fi

if [ "$TINY" ]; then
  SCRATCH=$(mktemp -d) && trap 'rm -rf "$SCRATCH"' EXIT
  export BENCHMARK_RESULTS=$SCRATCH OMP_NUM_THREADS=1
  LIMIT=0 # none: the machine may be busy
  WORLD=(--env ci) STUDY=(--seeds 0)
  COMMON=(--device cpu --dtype float32 --resolution 64 --batch 1 --anchor-steps 1 --seconds 0) COMPILED=("fused AdamW")
else
  python -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "Error: torch finds no CUDA device: install a torch that fits the driver, or give --tiny")'
  export BENCHMARK_RESULTS=${BENCHMARK_RESULTS:-$PWD/benchmarks/results/gpu}
  TEACHERS=${TEACHERS:-/tmp/random_teachers} WORLD=() STUDY=()
  COMMON=(--device cuda --seconds 40)
  COMPILED=("pictures of a cycle drawn at once, fused AdamW" "pictures of a cycle drawn at once, fused AdamW, blocks compiled")
fi

bench() { python "benchmarks/$1.py" "${@:2}"; }

# TEACHER: options that name a teacher with random weights of a real configuration
teacher() {
  TEACHER=(--config "$1_tiny")
  if [ -z "$TINY" ]; then python benchmarks/random_teacher.py "$1" "$TEACHERS/$1" && TEACHER=(--teacher "$TEACHERS/$1"); fi
}

# COMMON comes last and wins, so that --tiny replaces what a line gives
part() {
  case $1 in
  1) bench gpu_world line "${WORLD[@]}" ;;
  2)
    teacher sd35_medium
    bench gpu_card --env sd35_lora_16gb "${TEACHER[@]}" --batch 8 --card-gib 14.9 "${COMMON[@]}"
    bench gpu_card --env sd35 "${TEACHER[@]}" --batch 4 --card-gib 74.5 "${COMMON[@]}"
    ;;
  3)
    teacher sd35_medium
    bench bench_cycle --env sd35_lora_16gb "${TEACHER[@]}" --batch 1 --shared-networks --result published \
      --only "fused AdamW" "${COMMON[@]}"
    ;;
  4)
    teacher sd35_medium
    bench bench_cycle --env sd35_lora_16gb "${TEACHER[@]}" --batch 1 --shared-networks --result compiled \
      --no-shares --only "${COMPILED[@]}" "${COMMON[@]}"
    bench gpu_card --env sd35_lora_16gb "${TEACHER[@]}" --batch 1 --attention --result attention "${COMMON[@]}"
    ;;
  5)
    teacher sdxl
    bench gpu_card --env sdxl_lora_16gb "${TEACHER[@]}" --batch 8 --card-gib 14.9 "${COMMON[@]}"
    ;;
  6) bench gpu_world study "${WORLD[@]}" "${STUDY[@]}" ;;
  *) echo "Error: there is no part $1: see \`benchmarks/gpu_day.sh list\`" >&2 && return 2 ;;
  esac
}

if [ "${PART:-}" ]; then # under `timeout`
  part "$PART"
else
  for number in "$@"; do
    echo "== $number  ${PARTS[$((number - 1))]:-}"
    PART=$number timeout "$LIMIT" benchmarks/gpu_day.sh ${TINY:+--tiny} "$number"
  done
fi
