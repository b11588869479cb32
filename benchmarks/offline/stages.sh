# After unpack.sh: what is run on a GPU machine, stage by stage; each leaves its log and results in $OUT.
#   . benchmarks/offline/unpack.sh FOLDER && . benchmarks/offline/stages.sh && stage_tests && stage_server
OUT=${OUT:-$PWD/out}
mkdir -p "$OUT"

keep() { # LOG LINES COMMAND...: run it, keep what it prints, show the end
  local log=$OUT/$1.log lines=$2; shift 2
  local begin=$SECONDS
  "$@" >"$log" 2>&1
  local status=$?
  tail -n "$lines" "$log" | cut -c1-200
  echo "== $log: exit status $status after $((SECONDS - begin)) s"
  return $status
}
result() { for name in "$@"; do cp "benchmarks/results/$name.json" "$OUT/"; done; }

GPU_TESTS=(tests/kernels_gpu tests/execution tests/exactness/test_gpu_bits.py)
stage_tests() { keep tests 30 python3 -m pytest -q -m gpu -p no:cacheprovider --durations=8 "${GPU_TESTS[@]}" "$@"; }
# Small cases under compute-sanitizer: stage_sanitizer memcheck|initcheck|racecheck SECONDS
stage_sanitizer() {
  local small='not (50272 or 14336 or 6144 or one_long or more_rows or 128256 or 151936)'
  keep "$1" 8 timeout "$2" compute-sanitizer --tool "$1" --error-exitcode 9 \
    python3 -m pytest -q -m gpu -p no:cacheprovider tests/kernels_gpu -k "$small"
}
stage_attention() { keep attention 12 python3 -m benchmarks.kernels.gpu_attention --peer "$OFFLINE/fa3" --flashinfer "$OFFLINE/flashinfer" "$@"; result h100_attention; }
stage_invariant() { keep invariant 18 python3 -m benchmarks.engine.gpu_invariant; result h100_invariant; }
stage_engine() { keep engine 24 python3 -m benchmarks.engine.gpu_engine --vllm "$OFFLINE/vllm" "$@"; result h100_engine; }
TRITON=(--tokenizer "$PARTS/tokenizer" --tritonserver "$OFFLINE/triton/bin/tritonserver" --perf-analyzer "$OFFLINE/stub/bin/perf_analyzer")
stage_server() { keep server 40 in_stub python3 -m benchmarks.server.gpu_server "${TRITON[@]}" "$@"; result h100_server; }
stage_official() { stage_server --vllm-backend "$OFFLINE/vllm_backend/src" --vllm "$OFFLINE/vllm" "$@"; }
stage_soak() { # ARGUMENTS...: with the default model's tokenizer
  local model=~/.cache/pagedcore/models/SmolLM2-135M-Instruct
  [ -d $model ] || { mkdir -p "${model%/*}" && cp -r "$PARTS/tokenizer" $model; }
  keep soak 12 in_stub python3 -m tests.soak --device cuda --tritonserver "$OFFLINE/triton/bin/tritonserver" --record "$@"
  result soak_gpu; cp docs/soak_gpu.png "$OUT/"
}
stage_lock() { keep lock 20 in_stub python3 -m benchmarks.server.lock_profile "${TRITON[@]}" --py-spy "$1"; result h100_lock; }
stage_paper() { # MINUTES ARGUMENTS...
  local minutes=$1; shift
  keep "paper-$$" 10 python3 -m benchmarks.paper.gpu --minutes "$minutes" --out "$OUT/paper_gpu" "$@"
}
