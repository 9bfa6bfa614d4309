"""Golden models: small models that every runtime and precision is tried on.

`networks` go through every precision with every option, `traits` (operations and dtypes that
conversions are known to stumble over) through the precisions that matter for them.
"""

from tests.goldens import networks, traits
from tests.goldens.registry import GOLDENS, Golden, export, register

__all__ = ["GOLDENS", "Golden", "export", "networks", "register", "traits"]
