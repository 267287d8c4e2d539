"""The optional C extension; everything else is declared in setup.cfg.

Without a C compiler the installation succeeds and the pools run on torch's operations.
"""

import sys
import sysconfig
from glob import glob

from setuptools import Extension, setup

UNIX = ["-O3", "-fvisibility=hidden", "-fno-trapping-math", "-ffp-contract=fast", "-std=c11"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has none yet, and goes without

setup(
    ext_modules=[
        Extension(
            "padfree._maxpool",
            sorted(glob("padfree/*.c")),
            depends=sorted(glob("padfree/*.h")),
            extra_compile_args=[] if sys.platform == "win32" else UNIX + OPENMP,
            extra_link_args=OPENMP,
            py_limited_api=STABLE_ABI,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
