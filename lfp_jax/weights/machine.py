"""A pickle machine that runs nothing: the opcodes over plain containers and a table of names.

What a file names is looked up in a table of our own constructors; any other name becomes an
`Opaque` object that carries the name and does nothing when it is called, built or filled. Nothing
is imported. Work is bounded: no opcode recurses, the number of opcodes and the bytes copied have a
budget, and keys of dicts are simple (a nested key could take for ever to hash).
"""

import pickletools

_MAX_OPERATIONS = 2_000_000  # the largest known checkpoints need about 300,000
_MAX_LINE = 4096
_SIMPLE = (str, bytes, int, float, bool, type(None))


class Invalid(Exception):
    """What is wrong with a file, in one line without its name."""


def show(value):
    """Make something out of a file fit for a message: printable and short."""
    if not isinstance(value, str):  # text of a nested object could be endless
        value = value.name if isinstance(value, Opaque) else f"<{type(value).__name__}>"
    return ascii(value[:100])[1:-1]


class Opaque:
    """Something a file names that we do not know: inert, with its name and its state (a dict)."""

    __slots__ = ("name", "state")

    def __init__(self, name):
        """Hold a name; the state is empty."""
        self.name = name
        self.state = {}

    def __repr__(self):
        """Show the name only: a state may be huge or refer to itself."""
        return f"Opaque({show(self)})"


class Attributes(dict):
    """A plain object whose attributes are all there is to it, e.g. argparse.Namespace."""


class Constructor:
    """One of our functions, which a file may call by the name it stands under in the table."""

    __slots__ = ("make",)

    def __init__(self, make):
        """Hold the function."""
        self.make = make


class Budget:
    """How much work and memory one file may still cause."""

    def __init__(self, size):
        """Start with what a file of `size` bytes can honestly need."""
        self._operations = _MAX_OPERATIONS
        self._bytes = 2 * size + 2**20

    def spend(self, *, operations=0, copied=0):
        """Take operations and copied bytes off the budget.

        Raises:
            Invalid: the file asks for more than a checkpoint of its size can need.
        """
        self._operations -= operations
        self._bytes -= copied
        if self._operations < 0 or self._bytes < 0:
            raise Invalid("it asks for more work or memory than a checkpoint can need")


class Stream:
    """Reads bytes-like data as a file, never past its end, for pickletools."""

    def __init__(self, data):
        """Start at the first byte."""
        self.data = memoryview(data)
        self.position = 0

    def read(self, n):
        """Return the next n bytes, or what is left."""
        start = self.position
        self.position = min(start + n, len(self.data))
        return bytes(self.data[start : self.position])

    def readline(self):
        """Return up to the next newline (at most 4096 bytes)."""
        window = bytes(self.data[self.position : self.position + _MAX_LINE])
        line = window[: window.find(b"\n") + 1] or window
        self.position += len(line)
        return line

    def tell(self):
        """Return the position in bytes."""
        return self.position


class Machine:
    """Runs one pickle: `Machine(names, ...).run(stream)` returns its object."""

    def __init__(self, names, *, budget, build, persistent):
        """Take the table of names and what containers alone cannot do.

        Args:
            names: dict from "module.name" to a Constructor or a plain value.
            budget: a Budget, shared by all pickles of a file.
            build: function (target, state) that sets the state of what is no container.
            persistent: function of one persistent id.
        """
        self._names = names
        self._budget = budget
        self._build_other = build
        self._persistent = persistent
        self._stack = []
        self._below = []  # stacks under the open marks
        self._memo = {}

    def run(self, stream):
        """Run the pickle at the stream's position up to its STOP and return its object."""
        for opcode, argument, _ in pickletools.genops(stream):
            self._budget.spend(operations=1)
            name = opcode.name
            if name in _PUSH:
                self._stack.append(argument)
            elif name == "STOP":
                return self._stack.pop()
            elif name in _OPERATIONS:
                _OPERATIONS[name](self, argument)
            elif name not in _IGNORED:
                raise Invalid(f"its pickle uses the opcode {name}, which no checkpoint needs")
        raise Invalid("its pickle has no end")

    def _to_mark(self):
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _replace_mark(self, make):
        items = self._to_mark()
        self._stack.append(make(items))

    def _mark(self, _):
        self._below.append(self._stack)
        self._stack = []

    def _pop(self, _):
        # On an empty stack POP takes the mark below it.
        if self._stack:
            self._stack.pop()
        else:
            self._to_mark()

    def _dup(self, _):
        self._stack.append(self._stack[-1])

    def _put(self, index):
        self._memo[index] = self._stack[-1]

    def _memoize(self, _):
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index):
        if index not in self._memo:
            raise Invalid(f"its pickle reads memo {index}, which it never wrote")
        self._stack.append(self._memo[index])

    def _tuple_n(self, n):
        items = tuple(self._stack[len(self._stack) - n :])
        if len(items) != n:
            raise Invalid("its pickle takes more from the stack than it put there")
        del self._stack[len(self._stack) - n :]
        self._stack.append(items)

    def _append(self, items):
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise Invalid(f"its pickle appends to a {type(target).__name__}")

    def _set_items(self, items):
        target = self._stack[-1]
        if isinstance(target, dict):
            target.update(pairs(items))
        elif not isinstance(target, Opaque):
            raise Invalid(f"its pickle sets items of a {type(target).__name__}")

    def _add_items(self, _):
        items = self._to_mark()
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(simple(item) for item in items)
        elif not isinstance(target, Opaque):
            raise Invalid(f"its pickle adds items to a {type(target).__name__}")

    def _find(self, name):
        return self._names[name] if name in self._names else Opaque(name)

    def _global(self, argument):
        self._stack.append(self._find(argument.replace(" ", ".", 1)))

    def _stack_global(self, _):
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise Invalid("its pickle names a global by something that is no text")
        self._stack.append(self._find(f"{module}.{name}"))

    def _call(self, function, arguments, options):
        if isinstance(function, Constructor):
            self._stack.append(function.make(*arguments, **options))
        elif isinstance(function, Opaque):
            self._stack.append(Opaque(function.name))
        else:
            raise Invalid(f"its pickle calls a {type(function).__name__}")

    def _reduce(self, _):
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple):
            raise Invalid("its pickle calls a function without a tuple of arguments")
        self._call(function, arguments, {})

    def _new_with_options(self, _):
        options = self._stack.pop()
        arguments, function = self._stack.pop(), self._stack.pop()
        if not (isinstance(arguments, tuple) and isinstance(options, dict)):
            raise Invalid("its pickle calls a function without a tuple of arguments")
        self._call(function, arguments, options)

    def _instance(self, argument):
        arguments = self._to_mark()
        self._call(self._find(argument.replace(" ", ".", 1)), arguments, {})

    def _object(self, _):
        function, *arguments = self._to_mark()
        self._call(function, arguments, {})

    def _build(self, _):
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Opaque):
            target.state = state if isinstance(state, dict) else {}
        elif isinstance(target, Attributes) and isinstance(state, dict):
            self._budget.spend(operations=len(state))
            target.update(state)
        elif not isinstance(target, dict):  # attributes beside an OrderedDict's items are dropped
            self._build_other(target, state)

    def _persistent_id(self, _):
        self._stack.append(self._persistent(self._stack.pop()))


def simple(key):
    """Return a key of a dict or set if it is cheap to hash: a scalar, a tuple of them, an Opaque.

    Raises:
        Invalid: it is something else.
    """
    parts = key if isinstance(key, tuple) else (key,)
    if not all(isinstance(part, _SIMPLE) or type(part) is Opaque for part in parts):
        raise Invalid("its pickle uses a nested object as a key")
    return key


def pairs(items):
    """Make (key, value) pairs of the flat list key, value, key, value, ..."""
    return [(simple(k), v) for k, v in zip(items[::2], items[1::2], strict=True)]


_PUSH = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip
_IGNORED = frozenset(("PROTO", "FRAME"))
_OPERATIONS = {
    "NONE": lambda m, _: m._stack.append(None),
    "NEWTRUE": lambda m, _: m._stack.append(True),
    "NEWFALSE": lambda m, _: m._stack.append(False),
    "MARK": Machine._mark,
    "POP": Machine._pop,
    "POP_MARK": lambda m, _: m._to_mark(),
    "DUP": Machine._dup,
    "PUT": Machine._put,
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": Machine._memoize,
    "GET": Machine._get,
    "BINGET": Machine._get,
    "LONG_BINGET": Machine._get,
    "EMPTY_LIST": lambda m, _: m._stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m._stack.append(()),
    "EMPTY_DICT": lambda m, _: m._stack.append({}),
    "EMPTY_SET": lambda m, _: m._stack.append(set()),
    "LIST": lambda m, _: m._replace_mark(list),
    "TUPLE": lambda m, _: m._replace_mark(tuple),
    "DICT": lambda m, _: m._replace_mark(lambda items: dict(pairs(items))),
    "FROZENSET": lambda m, _: m._replace_mark(lambda items: frozenset(map(simple, items))),
    "TUPLE1": lambda m, _: m._tuple_n(1),
    "TUPLE2": lambda m, _: m._tuple_n(2),
    "TUPLE3": lambda m, _: m._tuple_n(3),
    "APPEND": lambda m, _: m._append([m._stack.pop()]),
    "APPENDS": lambda m, _: m._append(m._to_mark()),
    "SETITEM": lambda m, _: m._set_items([m._stack.pop(), m._stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m._set_items(m._to_mark()),
    "ADDITEMS": Machine._add_items,
    "GLOBAL": Machine._global,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "NEWOBJ_EX": Machine._new_with_options,
    "INST": Machine._instance,
    "OBJ": Machine._object,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent_id,
}
