"""The rewrites, one file each. Every module of this package registers its rule when it is imported."""

import importlib
import pkgutil

_ORDER = {"depthwise": 0, "dense": 1, "projection": 2, "stem": 3}
_names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith(("_", "base"))]
for _name in sorted(_names, key=lambda name: (_ORDER.get(name, len(_ORDER)), name)):
    importlib.import_module(f"{__name__}.{_name}")
