"""Make llama.cpp's environment: its own virtual environment, built for this processor, and the model as BF16 GGUF.

Usage: python llama_cpp_setup.py        (minutes, once: llama.cpp is compiled)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pagedcore.serve.cache import cache_root, scratch_folder
from pagedcore.serve.default_model import download_default_gguf

REQUIREMENT = "llama-cpp-python==0.3.36"
BF16 = 32  # LLAMA_FTYPE_MOSTLY_BF16

QUANTIZE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = int(sys.argv[3]), True
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def ensure_llama_cpp() -> tuple[Path, Path]:
    """Return (python, BF16 GGUF of the default model), making what is missing."""
    root = cache_root() / "peers"
    python, gguf = root / "llama-cpp" / "bin" / "python", root / "SmolLM2-135M-Instruct.BF16.gguf"
    if not python.exists():
        print("building llama.cpp, once (about 5 minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(root / "llama-cpp")], check=True)
        environment = {
            **os.environ,
            "CMAKE_ARGS": "-DGGML_NATIVE=ON",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
        }
        subprocess.run([str(python), "-m", "pip", "install", "-q", REQUIREMENT, "numpy"], check=True, env=environment)
    if not gguf.exists():
        with scratch_folder() as scratch:
            source, partial = download_default_gguf(scratch), gguf.with_suffix(".partial")
            quantize = [str(python), "-c", QUANTIZE, str(source), str(partial), str(BF16)]
            subprocess.run(quantize, check=True, stderr=subprocess.DEVNULL)  # a line for each tensor
            partial.replace(gguf)
    return python, gguf


if __name__ == "__main__":
    print(*ensure_llama_cpp())
