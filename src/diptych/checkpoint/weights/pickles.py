"""A pickle read as data: a machine that can build lists, dictionaries and records, and nothing else.

Python's own unpickler calls what the file names. This one walks the opcodes (`pickletools` splits them, executing
nothing) and keeps a name as a name: a global becomes a `Global` record if it is on the list below, otherwise the file
is refused; "calling" it makes a `Call` record that holds its arguments. So a file may say whatever it likes.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diptych.errors import CheckpointError

MAX_OPCODES = 1_000_000
"""A training checkpoint of the largest ViT with optimizer state takes a tenth of it."""


@dataclass(frozen=True)
class Global:
    """The name of something in Python: never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call(NamedTuple):
    """A call that the file asks for, with its arguments."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(eq=False)
class Instance:
    """An object the file describes: the name of its class and its attributes."""

    cls: Global
    state: dict[str, Any] = field(default_factory=dict)


class Storage(NamedTuple):
    """A persistent id of torch.save: type, key of the member that holds the bytes, number of elements."""

    type: Global
    key: str
    numel: int


_STORAGES = tuple(
    f"{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
)
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")

_ALLOWED: dict[str, frozenset[str]] = {
    # What honest checkpoints of weights mention: tensors, containers, settings, numpy's numbers in optimizer states.
    "collections": frozenset({"OrderedDict", "defaultdict", "Counter"}),
    "torch._utils": frozenset({"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor_v3"}),
    "torch._tensor": frozenset({"_rebuild_from_type_v2"}),
    "torch.nn.parameter": frozenset({"Parameter", "Buffer"}),
    "torch.storage": frozenset({"TypedStorage", "UntypedStorage"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.jit._pickle": frozenset(
        {"build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"}
    ),
    "torch": frozenset({"Size", "Tensor", "device", "dtype", *_DTYPES, *_STORAGES}),
    "numpy": frozenset({"dtype", "ndarray"}),
    "numpy.core.multiarray": frozenset({"scalar", "_reconstruct"}),
    "numpy._core.multiarray": frozenset({"scalar", "_reconstruct"}),
    "argparse": frozenset({"Namespace"}),
    "_codecs": frozenset({"encode"}),
    "builtins": frozenset({"set", "frozenset", "complex", "bytearray", "slice", "range"}),
    "__builtin__": frozenset({"set", "frozenset", "complex", "bytearray", "slice", "xrange"}),
    "pathlib": frozenset({"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"}),
}
_DICTIONARIES = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter")
_TORCHSCRIPT = "__torch__"
_MARK = object()


def read_pickle(data: bytes, what: str) -> Any:
    """Turn a pickle into lists, tuples, dictionaries, plain values and the records above.

    Raises CheckpointError, naming `what`, for a global that is not on the list, an opcode that checkpoints do not
    need, or a stream that makes no sense.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise CheckpointError(f"its pickle has more than {MAX_OPCODES} instructions")
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except CheckpointError as error:
        raise CheckpointError(f"{what} is refused: {error}") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
        detail = f"{type(error).__name__}: {str(error)[:80]!r}"
        raise CheckpointError(f"{what} is damaged: its pickle makes no sense ({detail})") from None
    raise CheckpointError(f"{what} is damaged: its pickle breaks off")


class _Machine:
    """The pickle machine: a stack with marks and a memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(f"its pickle uses the instruction {name}, which no checkpoint of weights needs")

    def result(self) -> Any:
        (value,) = self.stack
        return value

    def pop_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:  # an IndexError at the bottom
            position -= 1
            if position < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def push_global(self, module: str, name: str) -> None:
        known = name in _ALLOWED.get(module, ()) or module.split(".")[0] == _TORCHSCRIPT
        if not known or "\n" in module + name:
            raise CheckpointError(
                f"it wants {module[:60]!r} {name[:60]!r} from Python, but weights are tensors and plain values; "
                "if it is a whole pickled model, save model.state_dict() where it comes from"
            )
        self.stack.append(Global(module, name))

    def set_items(self, pairs: list[Any]) -> None:
        target: Any = self.stack[-1]
        if isinstance(target, Instance):  # a dictionary's subclass
            target = target.state
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError("items for something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Strings are hashed with a secret, small integers are spread: no key can be made to collide.
            if not (type(key) is str or (type(key) is int and abs(key) < 1 << 60)):
                raise ValueError(f"a dictionary's key of type {type(key).__name__}")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise ValueError("items for something that is no list")
        target.extend(items)

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise ValueError("a call of something that is no function")
        if str(function) in _DICTIONARIES:
            self.stack.append({})
        else:
            self.stack.append(Call(function, arguments))

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if type(cls) is not Global or type(arguments) is not tuple:
            raise ValueError("an object of something that is no class")
        self.stack.append(Instance(cls))

    def build(self) -> None:
        state = self.pop()
        target = self.stack[-1]
        if isinstance(target, Instance) and type(state) is dict:
            self.copied += len(state)  # the one instruction that takes memory of more than constant size
            if self.copied > MAX_OPCODES:
                raise CheckpointError(f"its pickle copies more than {MAX_OPCODES} attributes")
            target.state.update(state)
        elif not isinstance(target, (dict, Instance, Call)):  # attributes of a dictionary (`_metadata`) are dropped
            raise ValueError("a state for something that has none")

    def persistent(self) -> None:
        match self.pop():
            case ("storage", Global() as kind, str(key), str(), int(numel)) if type(numel) is int:
                self.stack.append(Storage(kind, key, numel))
            case _:
                raise ValueError("a persistent id that is no storage")

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a global whose name is no text")
        self.push_global(module, name)

    def push_tuple(self, size: int) -> None:
        items = tuple(self.pop() for _ in range(size))[::-1]
        self.stack.append(items)

    def push_dict(self, pairs: list[Any]) -> None:
        self.stack.append({})
        self.set_items(pairs)


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append([]),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "DICT": lambda m, _: m.push_dict(m.pop_mark()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, argument: m.push_global(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.call(),
    "NEWOBJ": lambda m, _: m.new_object(),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.persistent(),
    "GET": lambda m, argument: m.get(argument),
    "BINGET": lambda m, argument: m.get(argument),
    "LONG_BINGET": lambda m, argument: m.get(argument),
    "PUT": lambda m, argument: m.put(argument),
    "BINPUT": lambda m, argument: m.put(argument),
    "LONG_BINPUT": lambda m, argument: m.put(argument),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
}
