"""The table of cases on the CUDA kernels in this process; started by sanitize.py.

python -m tests.emulation.cases KIND SEED[,SEED...] [TEXT ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch

import fastnorm
from tests.cases import CASES, Case
from tests.compare import assert_as_good_as_torch
from tests.emulation import activate


def chosen(texts: tuple[str, ...]) -> Iterator[tuple[Case, torch.dtype]]:
    """Each case in the first of its dtypes that is fp32, and in bf16 if it has it."""
    for case in CASES:
        if texts and not any(text in str(case) for text in texts):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            if dtype in case.dtypes:
                yield case, dtype


def main(kind: str, seeds: str, *texts: str) -> int:
    reason = activate(kind)
    assert reason is None, reason  # what built the library could load it
    engine = sys.modules["fastnorm._cuda"].engine
    failed = 0
    for seed in map(int, seeds.split(",")):
        engine.configure(seed=seed)
        start, count = time.perf_counter(), 0
        for case, dtype in chosen(texts):
            torch.manual_seed(0)
            tensors = case.make(dtype)
            shape_of = tensors["v" if "v" in tensors else "x"]
            assert shape_of is not None
            dy = case.dy(torch.empty(shape_of.shape, dtype=dtype))
            what = f"{case} {dtype} seed {seed}"
            count += 1
            try:
                with fastnorm.backend("cuda"):
                    assert_as_good_as_torch(case.ours, case.torchs, tensors, dy, what)
            except (AssertionError, RuntimeError) as error:
                failed += 1
                print(f"{what}: {error}", file=sys.stderr, flush=True)
        print(f"seed {seed}: {count} cases, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{engine.launches} launches, {engine.switches} switches", flush=True)
    return 1 if failed or not engine.launches else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
