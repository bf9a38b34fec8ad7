"""Compile the Triton kernel for GPUs that need not be here. Not in a process that runs Triton's interpreter."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from detector.crop.triton_kernels import crop_kernel
from detector.crop.triton_sampler import CHANNELS_PER_PROGRAM, LAUNCH_OPTIONS


def compile_for(backend, architecture, task, channels_last, dtype="fp32", ratio=2, levels=4, **others):
    """Compile the kernel for a GPU that need not be here, with the arguments of an FPN of 256 channels.

    ``others`` are further constants; dtypes by their names.
    """
    pointer = f"*{dtype}"
    of_sums = "*fp64" if dtype == "fp64" else "*fp32"
    types = {
        **{"maps": (pointer,) * levels, "heights": ("fp32",) * levels, "widths": ("fp32",) * levels},
        **{"boxes": "*fp32", "index": "*i64", "crops": pointer, "map_gradient": of_sums, "box_gradient": of_sums},
        **dict.fromkeys(["rois", "images", "box_stride", "index_stride"], "i32"),
    }
    constants = {
        **{"TASK": task, "C": 256, "BINS_Y": 7, "BINS_X": 7, "SCALES": (0.25, 0.125, 0.0625, 0.03125)[:levels]},
        **{"AREAS": (112.0**2, 224.0**2, 448.0**2)[: levels - 1], "RATIO": ratio, "ALIGNED": False},
        **{"CHANNELS_LAST": channels_last, "GEOMETRY": tl.float32, "SUM": tl.float32, "OFFSET": tl.int32},
        **{"BLOCK_BINS": 64, "BLOCK_C": CHANNELS_PER_PROGRAM[task]},
    }
    constants |= {name: getattr(tl, value) if isinstance(value, str) else value for name, value in others.items()}
    names = crop_kernel.arg_names
    assert [*types, *constants] == names
    aligned = [(names.index("maps"), level) for level in range(levels)]
    aligned += [(names.index(name),) for name in types if str(types[name]).startswith("*")]
    source = ASTSource(
        crop_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={argument: [["tt.divisibility", 16]] for argument in aligned},
    )
    warp = 64 if backend == "hip" else 32
    return triton.compile(source, target=GPUTarget(backend, architecture, warp), options=LAUNCH_OPTIONS).asm
