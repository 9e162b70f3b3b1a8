"""Reading pickles that may come from anybody, in memory and time in proportion to their length.

`pickle.Unpickler` is not enough for that, even where it may import nothing: a pickle of nine bytes makes it allocate
gigabytes, and the hash of a few nested tuples takes for ever. So this reader knows only the instructions that make
containers, numbers and texts. None of them calls anything, and each takes no more memory than a multiple of its own
bytes. PyTorch reads the pickles of `torch.load(weights_only=True)` in the same way.

The result may share parts, so writing it out can still take any amount of memory: `_schema` checks it before anything
else looks at it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from ._schema import brief

#: The newest protocol of pickle.
NEWEST = 5
#: Bytes of a number, which fit 64 bits and a sign, and letters of one.
_NUMBER_BYTES, _NUMBER_LETTERS = 9, 24


class NotData(ValueError):
    """It is no pickle, or one of something else than data."""


class _Broken(NotData):
    """It is no pickle, or not all of one."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"it is not a pickle that can be read: {fault}")


def loads(data: bytes) -> Any:
    """What a pickle holds: lists, tuples, dicts with texts or integers as keys, texts, bytes, numbers of 64 bits, None.

    Raises:
        NotData: there is anything else in it, or it is no pickle.
    """
    reader = _Reader(data)
    try:
        return reader.run()
    except (IndexError, struct.error):
        raise _Broken("it ends early, or takes what is not there") from None


class _Reader:
    """The machine that a pickle is a program for: a stack, the stacks below the marks, and what was kept for later."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        #: Where the next instruction is.
        self._at = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        #: By number. No number is larger than the file, so none takes room for others.
        self._kept: dict[int, Any] = {}

    def run(self) -> Any:
        """Runs the pickle; returns what it leaves."""
        data, kept, actions = self._data, self._kept, _ACTIONS
        while True:
            code = data[self._at]
            self._at += 1
            # The most frequent ones of a snapshot are done here: a call for each would take twice as long.
            if code == 0x68:  # BINGET
                self._stack.append(self._kept_as(data[self._at]))
                self._at += 1
            elif code == 0x94:  # MEMOIZE
                kept[len(kept)] = self._stack[-1]
            elif code == 0x4B:  # BININT1
                self._stack.append(data[self._at])
                self._at += 1
            elif code == 0x2E:  # STOP
                return self._stack.pop()
            else:
                action = actions.get(code)
                if action is None:
                    raise _Broken(f"byte {self._at - 1} is {code:#04x}, and a snapshot holds nothing but data")
                action(self)

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        """The next bytes."""
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise _Broken(f"it ends where {count} bytes should follow")
        self._at += count
        return taken

    def _unpack(self, layout: struct.Struct) -> Any:
        """The next bytes as a number."""
        (value,) = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return value

    def _line(self) -> bytes:
        """What is left of the line."""
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise _Broken("a line does not end")
        line = self._data[self._at : end]
        self._at = end + 1
        return line

    # ---- numbers and texts -------------------------------------------------------------------------------------------

    def _protocol(self) -> None:
        number = self._take(1)[0]
        if number > NEWEST:
            raise NotData(f"it is a pickle of protocol {number}, and the newest that is known is {NEWEST}")

    def _long(self, layout: struct.Struct) -> None:
        count = self._unpack(layout)
        if not 0 <= count <= _NUMBER_BYTES:
            raise NotData(f"it holds an integer of {count} bytes, and those of a snapshot have 64 bits")
        self._stack.append(int.from_bytes(self._take(count), "little", signed=True))

    def _integer_line(self) -> None:
        text = self._line()
        if text in (b"00", b"01"):
            self._stack.append(text == b"01")
        else:
            self._stack.append(_in_text(int, text[:-1] if text.endswith(b"L") else text))

    def _float_line(self) -> None:
        self._stack.append(_in_text(float, self._line()))

    def _text(self, layout: struct.Struct) -> None:
        # A text that cannot be written into a page is of no use.
        self._stack.append(str(self._take(self._unpack(layout)), "utf-8", "replace"))

    def _text_line(self) -> None:
        text = str(self._line(), "raw-unicode-escape", "replace")
        self._stack.append(text.encode("utf-8", "replace").decode("utf-8"))

    def _bytes(self, layout: struct.Struct) -> None:
        self._stack.append(self._take(self._unpack(layout)))

    # ---- containers --------------------------------------------------------------------------------------------------

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        """What was put on the stack since the last mark, which ends there."""
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _close(self, made_of: Callable[[list[Any]], Any]) -> None:
        """Puts what is made of the items since the last mark on the stack below it."""
        made = made_of(self._since_mark())
        self._stack.append(made)

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        self._stack[len(self._stack) - count :] = [tuple(self._stack[len(self._stack) - count :])]

    def _pairs(self, items: list[Any]) -> list[tuple[Any, Any]]:
        """Keys and values."""
        if len(items) % 2:
            raise _Broken("a key has no value")
        for key in items[::2]:
            # The hash of a tuple takes as long and as deep as what it holds, and no snapshot has such keys.
            if type(key) is not str and type(key) is not int:
                raise NotData(f"it has {brief(key)} as the key of a dict, and those of a snapshot are texts")
        return list(zip(items[::2], items[1::2]))

    def _into_list(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise _Broken("it appends to what is no list")
        self._stack[-1].extend(items)

    def _into_dict(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not dict:
            raise _Broken("it sets keys of what is no dict")
        self._stack[-1].update(self._pairs(items))

    def _one_into_list(self) -> None:
        item = self._stack.pop()
        self._into_list([item])

    def _one_into_dict(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._into_dict([key, value])

    # ---- what is kept for later --------------------------------------------------------------------------------------

    def _keep(self, number: int) -> None:
        if not 0 <= number <= len(self._data):
            raise NotData(f"it keeps a part under the number {number}, and has not as many bytes")
        self._kept[number] = self._stack[-1]

    def _kept_as(self, number: int) -> Any:
        try:
            return self._kept[number]
        except KeyError:
            raise _Broken(f"it takes part {number}, which it has not kept") from None

    # ---- what would run something ------------------------------------------------------------------------------------

    def _global_line(self) -> None:
        module, name = self._line(), self._line()
        raise _no_data(module.decode("ascii", "replace"), name.decode("ascii", "replace"))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        raise _no_data(module, name)


def _no_data(module: object, name: object) -> NotData:
    called = ".".join(ascii(part[:60])[1:-1] if isinstance(part, str) else "?" for part in (module, name))
    return NotData(f"it asks for {called}, and a snapshot holds nothing but data")


def _in_text(kind: Callable[[bytes], Any], text: bytes) -> Any:
    """A number in decimal digits; converting takes time with the square of their count."""
    if len(text) > _NUMBER_LETTERS + 8 * (kind is float):
        raise NotData(f"it holds a number of {len(text)} letters, and those of a snapshot have 64 bits")
    try:
        return kind(text)
    except ValueError:
        raise _Broken("a number is none") from None


def _line_number(reader: _Reader) -> int:
    return int(_in_text(int, reader._line()))


_BYTE, _SHORT, _INT = struct.Struct("<B"), struct.Struct("<H"), struct.Struct("<i")
_UNSIGNED, _LENGTH, _FLOAT = struct.Struct("<I"), struct.Struct("<Q"), struct.Struct(">d")

#: What each instruction does, by its name in `pickletools`. What is missing makes no data.
_BY_CODE: dict[bytes, Callable[[_Reader], Any]] = {
    b"\x80": _Reader._protocol,  # PROTO
    b"\x95": lambda reader: reader._unpack(_LENGTH),  # FRAME: a hint for readers of streams
    b"(": _Reader._mark,
    b"0": lambda reader: reader._stack.pop(),  # POP
    b"1": _Reader._since_mark,  # POP_MARK
    b"2": lambda reader: reader._stack.append(reader._stack[-1]),  # DUP
    b"N": lambda reader: reader._stack.append(None),
    b"\x88": lambda reader: reader._stack.append(True),  # NEWTRUE
    b"\x89": lambda reader: reader._stack.append(False),  # NEWFALSE
    b"I": _Reader._integer_line,  # INT
    b"L": _Reader._integer_line,  # LONG
    b"J": lambda reader: reader._stack.append(reader._unpack(_INT)),  # BININT
    b"M": lambda reader: reader._stack.append(reader._unpack(_SHORT)),  # BININT2
    b"\x8a": lambda reader: reader._long(_BYTE),  # LONG1
    b"\x8b": lambda reader: reader._long(_INT),  # LONG4
    b"F": _Reader._float_line,  # FLOAT
    b"G": lambda reader: reader._stack.append(reader._unpack(_FLOAT)),  # BINFLOAT
    b"V": _Reader._text_line,  # UNICODE
    b"\x8c": lambda reader: reader._text(_BYTE),  # SHORT_BINUNICODE
    b"X": lambda reader: reader._text(_UNSIGNED),  # BINUNICODE
    b"\x8d": lambda reader: reader._text(_LENGTH),  # BINUNICODE8
    b"C": lambda reader: reader._bytes(_BYTE),  # SHORT_BINBYTES
    b"B": lambda reader: reader._bytes(_UNSIGNED),  # BINBYTES
    b"\x8e": lambda reader: reader._bytes(_LENGTH),  # BINBYTES8
    b"]": lambda reader: reader._stack.append([]),  # EMPTY_LIST
    b"}": lambda reader: reader._stack.append({}),  # EMPTY_DICT
    b")": lambda reader: reader._stack.append(()),  # EMPTY_TUPLE
    b"\x85": lambda reader: reader._tuple(1),  # TUPLE1
    b"\x86": lambda reader: reader._tuple(2),  # TUPLE2
    b"\x87": lambda reader: reader._tuple(3),  # TUPLE3
    b"t": lambda reader: reader._close(tuple),  # TUPLE
    b"l": lambda reader: reader._close(list),  # LIST
    b"d": lambda reader: reader._close(lambda items: dict(reader._pairs(items))),  # DICT
    b"a": _Reader._one_into_list,  # APPEND
    b"e": lambda reader: reader._into_list(reader._since_mark()),  # APPENDS
    b"s": _Reader._one_into_dict,  # SETITEM
    b"u": lambda reader: reader._into_dict(reader._since_mark()),  # SETITEMS
    b"p": lambda reader: reader._keep(_line_number(reader)),  # PUT
    b"q": lambda reader: reader._keep(reader._unpack(_BYTE)),  # BINPUT
    b"r": lambda reader: reader._keep(reader._unpack(_UNSIGNED)),  # LONG_BINPUT
    b"g": lambda reader: reader._stack.append(reader._kept_as(_line_number(reader))),  # GET
    b"j": lambda reader: reader._stack.append(reader._kept_as(reader._unpack(_UNSIGNED))),  # LONG_BINGET
    b"c": _Reader._global_line,  # GLOBAL
    b"i": _Reader._global_line,  # INST
    b"\x93": _Reader._stack_global,  # STACK_GLOBAL
}
_ACTIONS = {code[0]: action for code, action in _BY_CODE.items()}
