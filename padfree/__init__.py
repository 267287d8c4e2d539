"""padfree rewrites existing convolutional networks into their padding-free form.

model = padfree.convert(timm.create_model("mobilenetv3_large_100"))
"""

from padfree import export
from padfree.advise.advice import Advice, advise
from padfree.convert import Plan, convert, is_converted, plan
from padfree.deploy.fuse import fuse
from padfree.errors import PadfreeError
from padfree.files.weights import load, save
from padfree.report.comparison import Comparison, compare
from padfree.rules.base import Example, Rule, register
from padfree.types import Match, Options, Skip

__version__ = "0.1.0"
__all__ = [
    "Advice",
    "Comparison",
    "Example",
    "Match",
    "Options",
    "PadfreeError",
    "Plan",
    "Rule",
    "Skip",
    "__version__",
    "advise",
    "compare",
    "convert",
    "export",
    "fuse",
    "is_converted",
    "load",
    "plan",
    "register",
    "save",
]
