"""timm's networks in padding-free form, by name.

    import padfree.timm

    model = timm.create_model("padfree_mobilenetv3_large_100", pretrained=True)

Importing this registers `padfree_<name>` with timm for every network of timm's that can be converted; nothing is built
before it is asked for. `python -m padfree.timm train.py --model padfree_...` runs a script with the names known.
"""

from padfree.timm.building import named
from padfree.timm.names import convertible
from padfree.timm.padfree_networks import register

__all__ = ["convertible", "named", "register"]

register(*convertible())
