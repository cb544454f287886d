"""All kernels of one library over cases of all families, with numpy alone:

    python -m tests.ops.cpu.sweep LIBRARY [--products LIBDNNL] [--count N] [--out RESULTS.npz]

The library reads how many threads to start once for a process, and looks for oneDNN once: tests start this
script for each. It also calls the kernels from two threads at once and from a forked child.
"""

from __future__ import annotations

import argparse
import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.ops.cpu.cases import ALL, OTHERS, Case, large, some
from tests.ops.cpu.native import Kernels

Results = list[list[np.ndarray]]


def cases(count: int) -> list[Case]:
    """``count`` of each family, and large ones."""
    return [*(case for name in ALL for case in some(name, count)), *large()]


def others(count: int) -> list[Case]:
    """The same of families whose results are checked elsewhere."""
    return [case for name in OTHERS for case in some(name, count)]


def save(path: Path, results: Results) -> None:
    np.savez(
        path, **{f"{i}-{j}": array for i, arrays in enumerate(results) for j, array in enumerate(arrays)}
    )


def load(path: Path) -> Results:
    """What `save` wrote."""
    with np.load(path) as file:
        results: Results = []
        for name in file.files:
            if int(name.split("-")[0]) == len(results):
                results.append([])
            results[-1].append(file[name])
        return results


def assert_same(found: Results, expected: Results) -> None:
    """Bit for bit: who computes a piece changes nothing of it."""
    for mine, other in zip(found, expected, strict=True):
        for one, two in zip(mine, other, strict=True):
            np.testing.assert_array_equal(one, two)


def in_a_child(kernels: Kernels, some_cases: list[Case], expected: Results) -> None:
    """A forked process has none of its parent's threads, and must not wait for them."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert_same([case.run(kernels) for case in some_cases], expected)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the forked child failed"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library")
    parser.add_argument("--products")
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.products:
        ctypes.CDLL(arguments.products, mode=ctypes.RTLD_GLOBAL)
    kernels, checked = Kernels(arguments.library), cases(arguments.count)
    todo = [*checked, *others(arguments.count)]
    assert bool(kernels.library.has_fast_products()) == bool(arguments.products)

    def run(_=None) -> Results:
        return [case.run(kernels) for case in todo]

    results = run()
    if arguments.out:
        save(arguments.out, results[: len(checked)])
    with ThreadPoolExecutor(2) as threads:
        for again in threads.map(run, range(2)):
            assert_same(again, results)
    in_a_child(kernels, todo, results)
    print(f"{len(todo)} cases, each in one thread, in two at once and in a child")


if __name__ == "__main__":
    main()
