"""Puts mutants into effect: in the running Python modules, or in a build of the block manager that has all native ones."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pybind11

from tests.simulation.mutants import Mutant
from tests.simulation.native_mutants import NATIVE_MUTANTS

PAGEDCORE = Path(__file__).resolve().parents[2] / "pagedcore"


def mutated(mutant: Mutant, source: str) -> str:
    """`source` with the mutant; ValueError if its text is not there exactly once: it has to follow the code."""
    count = source.count(mutant.old)
    if count != 1:
        raise ValueError(
            f"mutant {mutant.what!r}: its text is {count} times in pagedcore/{mutant.file}, and must be once"
        )
    return source.replace(mutant.old, mutant.new)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """A Python mutant in effect: the functions of its module that differ are exchanged."""
    module = importlib.import_module("pagedcore." + mutant.file.removesuffix(".py").replace("/", "."))
    path = PAGEDCORE / mutant.file
    fresh = ModuleType(module.__name__)
    exec(compile(mutated(mutant, path.read_text(encoding="utf-8")), str(path), "exec"), vars(fresh))
    exchanged = [*_different(module, fresh, module.__name__)]
    assert exchanged, f"mutant {mutant.what!r} changes no function"
    for name, value in vars(module).items():
        if inspect.isclass(value):
            setattr(fresh, name, value)  # there must not be two of any class
    try:
        for owner, name, _, function in exchanged:
            setattr(owner, name, function)
        yield
    finally:
        for owner, name, original, _ in exchanged:
            setattr(owner, name, original)


def _different(old: Any, new: Any, module_name: str) -> Iterator[tuple[Any, str, Any, Any]]:
    """(owner, name, original, mutant) of every function in a module or class whose code differs."""
    for name, function in vars(new).items():
        original = vars(old).get(name)
        if inspect.isclass(function) and function.__module__ == module_name:
            yield from _different(original, function, module_name)
            continue
        codes = [_code_of(value) for value in (original, function)]
        if None not in codes and codes[0] != codes[1]:
            yield old, name, original, function


def _code_of(value: Any) -> tuple[Any, ...] | None:
    """What a function does, apart from where it stands; None for anything else."""
    function = value.fget if isinstance(value, property) else value
    return _comparable(function.__code__) if isinstance(function, FunctionType) else None


def _comparable(code: CodeType) -> tuple[Any, ...]:
    constants = [_comparable(value) if inspect.iscode(value) else repr(value) for value in code.co_consts]
    return code.co_code, code.co_names, constants


class NativeMutants:
    """A build of pagedcore._core with every native mutant in it, none of them in effect at first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        self._build(folder)
        self._in_effect = ctypes.c_int.in_dll(ctypes.CDLL(str(self.path)), "planted_mutant")

    @contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        self._in_effect.value = NATIVE_MUTANTS.index(mutant) + 1
        try:
            yield
        finally:
            self._in_effect.value = 0

    def _build(self, folder: Path) -> None:
        sources = []
        for original in sorted((PAGEDCORE / "csrc").glob("*.cc")):
            text = original.read_text(encoding="utf-8")
            for number, mutant in enumerate(NATIVE_MUTANTS, 1):
                if mutant.file == f"csrc/{original.name}":
                    text = mutated(mutant, text).replace("PLANTED", f"(::planted_mutant == {number})")
            source = folder / original.name
            source.write_text(f'extern "C" __attribute__((visibility("default"))) int planted_mutant;\n{text}')
            sources.append(source)
        switch = folder / "planted_mutant.cc"
        switch.write_text(
            'extern "C" __attribute__((visibility("default"))) int planted_mutant;\nint planted_mutant = 0;\n'
        )
        include = [pybind11.get_include(), sysconfig.get_path("include"), str(PAGEDCORE / "csrc")]
        # The namespace gets another name, so that the types are not those of the real module.
        flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Dpagedcore=pagedcore_mutants"]
        command = ["g++", *flags, *(f"-I{path}" for path in include)]
        with ThreadPoolExecutor(2) as pool:
            sources.append(switch)
            objects = [source.with_suffix(".o") for source in sources]
            compile_one = partial(_compile, command)
            list(pool.map(compile_one, sources, objects))
        subprocess.run(["g++", "-shared", *objects, "-o", self.path], check=True)


def _compile(command: list[str], source: Path, target: Path) -> None:
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
