from __future__ import annotations

import pytest
import torch

from embedstream.consumer.faults import BrokenDevice, Fault, fault_of

MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError("CUDA error: out of memory"),
]
DEVICE = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("HIP error: unspecified launch failure"),
    torch.AcceleratorError("something new"),
    BrokenDevice("lost"),
]
INPUT = [
    ValueError("CUDA error: a text that says so"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    KeyError("out of memory"),
    IndexError("index out of range in self"),
    SystemExit(1),
]


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        *((error, Fault.MEMORY) for error in MEMORY),
        *((error, Fault.DEVICE) for error in DEVICE),
        *((error, Fault.INPUT) for error in INPUT),
    ],
    ids=repr,
)
def test_whose_fault_it_is(error: BaseException, fault: Fault) -> None:
    assert fault_of(error) is fault


def test_a_library_of_its_own_may_name_its_error_so() -> None:
    class OutOfMemoryError(Exception):
        pass

    class Deeper(OutOfMemoryError):
        pass

    assert fault_of(Deeper("no room")) is Fault.MEMORY
