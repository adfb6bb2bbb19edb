"""Integers of Python, numpy and torch as plain ints, for arguments such as compression ratios.

numpy's integers cannot be written as JSON, and tensors cannot be keys of dictionaries.
"""

import operator
from collections.abc import Iterable
from typing import Any

from cat_fast.errors import UserError


def as_integer(value: Any) -> int | None:
    """Return an integer of Python, numpy or torch as an int; None for anything else, such as True or 8.0."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def to_integer(name: str, value: Any) -> int:
    """Return an integer argument as an int.

    Raises:
        UserError: another value; `name` is the argument's name.
    """
    integer = as_integer(value)
    if integer is None:
        raise UserError(f"{name}: expected an integer, got {value!r}")
    return integer


def to_integers(name: str, values: Any) -> tuple[int, ...]:
    """Return a sequence of integers, an array or a tensor as a tuple of ints.

    Raises:
        UserError: not a sequence of integers; `name` is the argument's name.
    """
    plain = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(plain, Iterable) or isinstance(plain, str):
        raise UserError(f"{name}: expected a sequence of integers, got {values!r}")
    return tuple(to_integer(name, value) for value in plain)


def store_integers(record: Any, *names: str) -> None:
    """Replace numpy and torch integers in fields of a frozen dataclass by ints; other values are kept."""
    for name in names:
        value = getattr(record, name)
        if type(value) is not int and (integer := as_integer(value)) is not None:
            object.__setattr__(record, name, integer)
