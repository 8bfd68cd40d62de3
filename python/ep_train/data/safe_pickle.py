"""Read a pickle of plain values and uint8 arrays without running anything that it names.

A pickle is a program: it may name any importable function and call it. This reader knows only the
instructions that lists, dictionaries, numbers, strings and numpy arrays need; the three names numpy
arrays are made of lead to stand-ins here, and every other name is refused. No numpy code sees the
file either: `PickledArray.to_numpy` checks shape and length first.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

# The binary instructions of protocols 2-4 for plain data. Left out on purpose: every other way to call or
# make classes (NEWOBJ, INST, OBJ, EXT, PERSID), DICT, and BYTEARRAY8, which allocates what it is told.
_ALLOWED = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT,
    pickle.BINSTRING, pickle.SHORT_BINSTRING, pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.BINBYTES8,
    pickle.BINUNICODE, pickle.SHORT_BINUNICODE,
    pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS,
    pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD,
)  # fmt: skip


class UnsafePickleError(pickle.UnpicklingError):
    """The pickle asks for more than plain values and arrays."""


class PickledArray:
    """A numpy array as its pickle describes it: nothing is checked until `to_numpy`."""

    def __init__(self) -> None:
        self.state: Any = None

    def to_numpy(self) -> npt.NDArray[np.uint8]:
        """The array, a copy.

        Raises:
            ValueError: the dtype is not uint8, or the bytes do not fill the shape.
        """
        match self.state:
            case (int(), tuple() as shape, PickledDtype(code=str() as code), fortran, bytes() as raw):
                pass
            case _:
                raise ValueError("the array's state is damaged")
        if code not in ("u1", "|u1", "uint8"):
            raise ValueError(f"the array holds {code!r}, expected uint8 ('u1')")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError("the array's shape is damaged")
        if math.prod(shape) != len(raw):
            raise ValueError(f"the array's shape {shape} does not fit its {len(raw):,} bytes")
        return np.frombuffer(bytearray(raw), dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class PickledDtype:
    """A numpy dtype as its pickle describes it: only its code is kept."""

    def __init__(self, code: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.state: Any = None  # byte order and field layout: no meaning for one byte


class _Name:
    """What an allowed global becomes: a token that REDUCE knows how to call."""

    def __init__(self, make: Callable[[tuple[Any, ...]], object]) -> None:
        self.make = make


def _encode(arguments: tuple[Any, ...]) -> bytes:
    """`_codecs.encode(text, 'latin1')`: how Python 3 writes bytes in protocol 2."""
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise UnsafePickleError("it calls _codecs.encode for something else than bytes")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], _Name] = {
    ("numpy.core.multiarray", "_reconstruct"): _Name(lambda _: PickledArray()),
    ("numpy._core.multiarray", "_reconstruct"): _Name(lambda _: PickledArray()),
    ("numpy", "ndarray"): _Name(lambda _: PickledArray()),
    ("numpy", "dtype"): _Name(lambda arguments: PickledDtype(arguments[0])),
    ("_codecs", "encode"): _Name(_encode),
}


class _Unpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, cut down to `_ALLOWED` and `_NAMES`.

    The one in C cannot be cut down, and lets a 5-byte instruction allocate 32 GiB (LONG_BINPUT).
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _ALLOWED
    }

    stack: list[Any]  # these two are the base class's, which typeshed does not describe
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise UnsafePickleError(f"it names {module}.{name}, which plain data never needs") from None

    def _reduce(self) -> None:
        stack = self.stack
        arguments = stack.pop()
        target = stack[-1]
        if not isinstance(target, _Name) or not isinstance(arguments, tuple):
            raise UnsafePickleError("it calls something that is no array")
        stack[-1] = target.make(arguments)

    def _build(self) -> None:
        stack = self.stack
        state = stack.pop()
        if not isinstance(stack[-1], PickledArray | PickledDtype):
            raise UnsafePickleError("it sets the state of something that is no array")
        stack[-1].state = state

    def _set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        self._store([(key, value)])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._store(list(zip(items[::2], items[1::2], strict=True)))

    def _store(self, items: list[tuple[Any, Any]]) -> None:
        # Strings only: hashing a tuple nested a million deep overflows the C stack.
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, bytes | str) for key, _ in items):
            raise UnsafePickleError("it fills something that is no dictionary of strings")
        self.stack[-1].update(items)

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items


def load_plain_pickle(data: bytes) -> object:
    """The value a pickle holds, with `PickledArray` in place of arrays and bytes for Python 2's str.

    Raises:
        UnsafePickleError: it names or calls anything but what numpy arrays are made of.
        ValueError: it is damaged, or uses an instruction that plain data does not need.
    """
    try:
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except UnsafePickleError:
        raise
    except KeyError as error:
        code = error.args[0]
        what = f"instruction {code:#04x} is not allowed" if isinstance(code, int) else f"{code!r} is missing"
        raise ValueError(what) from error
    except Exception as error:  # a damaged program can fail in any way
        raise ValueError(f"{type(error).__name__}: {error}") from error
