"""Imports of packages that belong to an extra of this package."""

import importlib
from typing import Any

from cat_fast.errors import UserError


def import_extra(module: str, package: str, extra: str, purpose: str) -> Any:
    """Import a module of the package `package`, which the extra `extra` installs.

    Raises:
        UserError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{purpose}: the package {package} is missing; install it with pip install 'cat-fast[{extra}]'"
        ) from error
