"""The kernels' thread pool: nothing lost or done twice, resizable, usable from any thread, harmless at exit and after fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pagedcore import ops

ROOT = Path(__file__).resolve().parents[2]


def test_every_item_is_done_exactly_once_and_exit_waits_for_nobody(tmp_path: Path) -> None:
    program = tmp_path / "stress"
    sources = [ROOT / "kernels" / "cpu" / "thread_pool.cc", Path(__file__).with_name("thread_pool_stress.cc")]
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O2", "-pthread", f"-I{ROOT / 'kernels'}", "-o", str(program)]
    subprocess.run([compiler, *flags, *map(str, sources)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "passed\n", "")


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_default_is_the_cores_this_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from pagedcore import ops; print(ops.num_threads())"
    assert run_python(code) == "1"
    assert int(run_python("from pagedcore import ops; print(ops.num_threads())")) == len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("restore_threads")
def test_the_number_of_threads_can_change_between_calls() -> None:
    x, packed = torch.randn(16, 256), ops.pack_linear(torch.randn(512, 256))
    ops.set_num_threads(1)
    expected = ops.packed_linear(x, packed)
    others = len(os.listdir("/proc/self/task"))
    for threads in (1, 4, 2, 7, 1, 2):
        ops.set_num_threads(threads)
        assert ops.num_threads() == threads
        assert torch.equal(ops.packed_linear(x, packed), expected)
        assert len(os.listdir("/proc/self/task")) == others + threads - 1


@pytest.mark.parametrize("threads", (0, -1))
def test_fewer_threads_than_one_are_refused(threads: int) -> None:
    before = ops.num_threads()
    with pytest.raises(ValueError, match=f"num_threads must be 1 or more, got {threads}"):
        ops.set_num_threads(threads)
    assert ops.num_threads() == before


@pytest.mark.usefixtures("restore_threads")
def test_callers_from_several_threads_take_turns() -> None:
    ops.set_num_threads(3)
    packed = ops.pack_linear(torch.randn(512, 128))
    inputs = [torch.randn(9, 128) for _ in range(4)]
    expected = [ops.packed_linear(x, packed) for x in inputs]
    wrong: list[int] = []

    def caller(index: int) -> None:
        for _ in range(300):
            if not torch.equal(ops.packed_linear(inputs[index], packed), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=caller, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


USE_THE_POOL = """
import os, torch
from pagedcore import ops
ops.set_num_threads(3)
x, packed = torch.ones(8, 128), ops.pack_linear(torch.ones(512, 128))
ops.packed_linear(x, packed)
"""


def test_a_forked_child_computes() -> None:
    child = USE_THE_POOL + (
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    right = bool((ops.packed_linear(x, packed) == 128).all())\n"
        "    ops.set_num_threads(2)\n"
        "    right = right and bool((ops.packed_linear(x, packed) == 128).all())\n"
        "    os._exit(0 if right else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    assert run_python(child) == "0"
