"""What the Triton kernel compiles to for an H100, and what its calls cost the host. Needs Triton, but no GPU.

python .github/assets/triton_kernels.py
"""

import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from torchvision.ops import MultiScaleRoIAlign

import detector.crop.crop
import detector.crop.triton_kernels
from detector import MultiScaleAffineCrop

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.cross_compile import compile_for

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
COUNTS = {2: "2", 0: "adaptive", -1: "none (prroi_pool2d)"}


def dump(option: str, cubin: bytes) -> str:
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout


def print_variants() -> None:
    print("| task | maps | samples | registers | spilled bytes | 16-byte loads | 16-byte adds |")
    print("|---|---|---|---|---|---|---|")
    for task in ("crop", "both", "boxes"):
        for dtype, channels_last in (("fp32", True), ("bf16", True), ("fp32", False)):
            for ratio, samples in COUNTS.items():
                cubin = compile_for("cuda", 90, task, channels_last, dtype, ratio)["cubin"]
                registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("-res-usage", cubin)).groups()
                code = dump("-sass", cubin)
                wide = [len(re.findall(pattern, code)) for pattern in (r"LDG\.E\.128", r"REDG\.E\.ADD\.F32x4")]
                layout = "channels_last" if channels_last else "NCHW"
                print(f"| {task} | {dtype}, {layout} | {samples} | {registers} | {stack} | {wide[0]} | {wide[1]} |")


class NoKernel:
    """Takes a launch and does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: None


def print_host_times() -> None:
    """Time calls on tiny maps without Triton's launch, and torchvision's, which computes little here."""
    detector.crop.crop._has_triton = lambda device: True
    detector.crop.triton_kernels.crop_kernel = NoKernel()
    torch.set_num_threads(1)
    names = ["0", "1", "2", "3"]
    features = {name: torch.randn(2, 8, 64 >> int(name), 64 >> int(name)).requires_grad_() for name in names}
    boxes = [torch.tensor([[10.0, 20.0, 60.0, 90.0], [5.0, 5.0, 250.0, 200.0]]) for _ in range(2)]
    for pool in (MultiScaleRoIAlign(names, 7, 2), MultiScaleAffineCrop(names, 7, 2, sampler="triton")):
        moved = [b.clone().requires_grad_(type(pool) is MultiScaleAffineCrop) for b in boxes]
        inputs = [tensor for tensor in (*features.values(), *moved) if tensor.requires_grad]
        times = []
        for _ in range(300):
            start = time.perf_counter()
            crops = pool(features, moved, [(256, 256)] * 2)
            middle = time.perf_counter()
            torch.autograd.grad(crops, inputs, torch.ones_like(crops))
            times.append((middle - start, time.perf_counter() - middle))
        forward, backward = (round(1e6 * median(values)) for values in zip(*times[100:]))
        print(f"{type(pool).__name__}: forward {forward} and backward {backward} microseconds")


if __name__ == "__main__":
    print_variants()
    print_host_times()
