"""The CPU kernels' surroundings: captured calls, threads, the instruction set, memory pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from pagedcore import _kernels


class CpuGraph:
    """CPU kernel calls, captured once and replayed without Python between them, as torch.cuda.CUDAGraph does.

    A replay reads and writes the memory that the captured calls were given: those tensors must stay alive and in place.
    """

    def __init__(self) -> None:
        self._graph = _kernels.cpu.Graph()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Inside, the CPU operations of this package that this thread calls are recorded and not run."""
        self._graph.begin_capture()
        try:
            yield
        finally:
            self._graph.end_capture()

    def replay(self) -> None:
        """Run the captured calls in their order; the GIL is released once for all of them."""
        self._graph.replay()


def request_huge_pages(tensor: Tensor) -> None:
    """Ask the system to put a CPU tensor that was not written yet into huge pages (2 MiB): a hint, which it may ignore."""
    _kernels.cpu.request_huge_pages(tensor.data_ptr(), tensor.nbytes)


def set_num_threads(num_threads: int) -> None:
    """How many threads the CPU kernels use, the caller's included. ValueError below 1."""
    _kernels.cpu.set_num_threads(num_threads)


def num_threads() -> int:
    """How many threads the CPU kernels use."""
    return _kernels.cpu.num_threads()


def instruction_set() -> str:
    """The CPU kernels' variant: avx512_bf16, avx512, avx2 or generic."""
    return _kernels.cpu.instruction_set()
