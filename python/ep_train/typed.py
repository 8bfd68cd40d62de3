"""Values against the declared types of a dataclass: what neither Python nor a JSON file checks."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(config: object) -> None:
    """Check every field of a dataclass.

    Raises:
        ValueError: a value is not of its field's type; it is named, with what is expected.
    """
    kind = type(config)
    for name, hint in get_type_hints(kind).items():
        value = getattr(config, name)
        if not fits(value, hint):
            expected = _expected(hint)
            raise ValueError(f"{kind.__name__}: argument '{name}': expected {expected}, got {value!r}")


def fits(value: object, hint: Any) -> bool:
    """The value is of the type: Literal, unions, tuples and classes; an int is a float, a bool is no number."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in parts
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = [parts[0]] * len(value) if len(parts) == 2 and parts[1] is Ellipsis else list(parts)
        return len(kinds) == len(value) and all(fits(v, kind) for v, kind in zip(value, kinds, strict=True))
    if hint in (float, int):
        numbers = (int, float) if hint is float else (int,)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_expected(part) for part in get_args(hint))
    if isinstance(hint, type) and get_origin(hint) is None:
        return "None" if hint is type(None) else hint.__name__
    return str(hint)
