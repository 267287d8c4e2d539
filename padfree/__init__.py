"""padfree rewrites existing convolutional networks into their padding-free form.

model = padfree.convert(timm.create_model("mobilenetv3_large_100"))
"""

from padfree import export
from padfree.adapt.calibrate import calibrate
from padfree.adapt.report import Calibration
from padfree.advise.advice import advise
from padfree.advise.results import Advice
from padfree.borders.effect import border_effect
from padfree.borders.footprint import footprint
from padfree.convert import Plan, convert, is_converted, plan
from padfree.deploy.fuse import fuse
from padfree.errors import PadfreeError, UntrainedWarning
from padfree.files.weights import load, save
from padfree.layers.separable import orthonormal_loss
from padfree.replacing.replace import plan_replacement, replace
from padfree.report.comparison import Comparison, compare
from padfree.rules.base import Example, Rule, register
from padfree.types import Match, Options, Skip

__version__ = "0.1.0"
__all__ = [
    "Advice",
    "Calibration",
    "Comparison",
    "Example",
    "Match",
    "Options",
    "PadfreeError",
    "Plan",
    "Rule",
    "Skip",
    "UntrainedWarning",
    "__version__",
    "advise",
    "border_effect",
    "calibrate",
    "compare",
    "convert",
    "export",
    "footprint",
    "fuse",
    "is_converted",
    "load",
    "orthonormal_loss",
    "plan",
    "plan_replacement",
    "register",
    "replace",
    "save",
]
