"""The optional C extension; everything else is declared in setup.cfg.

It knows nothing of torch (addresses and sizes), so that one wheel serves every torch and Python. Without a C compiler
the installation succeeds and the operators run on torch's own; `padfree-convert --version` says which.
"""

import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

UNIX = ["-O3", "-fvisibility=hidden", "-fno-trapping-math", "-ffp-contract=fast", "-std=c11"]
MSVC = ["/O2", "/std:c11"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []  # elsewhere one thread: Apple's clang has no runtime for it
SOURCES = "padfree/kernels/csrc"
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has none yet, and goes without

setup(
    ext_modules=[
        Extension(
            "padfree.kernels._native",
            sorted(glob(f"{SOURCES}/*.c")),
            depends=sorted(glob(f"{SOURCES}/*.h")),
            extra_compile_args=MSVC if sys.platform == "win32" else UNIX + OPENMP,
            extra_link_args=OPENMP,
            py_limited_api=STABLE_ABI,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
