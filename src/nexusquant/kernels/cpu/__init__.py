"""Numba kernels for CPUs: `operator` is what the rest of the package sees.

Importing it needs Numba and, on x86, a CPU that converts half precision (F16C, since 2012): LLVM
would end the process for want of a function that does it in software.
"""

import platform

from numba.core.registry import cpu_target

if platform.machine() in ("x86_64", "AMD64"):
    features = cpu_target.target_context.codegen().magic_tuple()[2]
    if "+f16c" not in features:
        raise ImportError("this CPU, or NUMBA_CPU_NAME, has no F16C (half-precision conversion)")
