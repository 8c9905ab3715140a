"""Checks, without unpickling, that a pickle contains only what ``torch.save`` writes for a dict of tensors."""

from __future__ import annotations

import pickletools

from t2l_engine.files.errors import short_repr

MAX_DIMENSIONS = 64  # torch's limit
#: All globals that a pickle of plain tensors uses.
ORDERED_DICT, REBUILD, PARAMETER = (
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
)  # fmt: skip
STORAGES = frozenset(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int"))
NAMES = STORAGES | {ORDERED_DICT, REBUILD, PARAMETER}
#: Opcodes that push a value -> type of the value.
VALUES = dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), int) | {"NEWTRUE": bool, "NEWFALSE": bool, "NONE": None}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}


class Refused(Exception):
    """The file is not a plain tensor file; the message says why."""


class _Tuple:
    """``items`` may contain tuples of plain values, as arguments of a call do; deeper nesting is refused."""

    def __init__(self, items: list):
        self.items, self.flat = items, not any(isinstance(item, _Tuple) for item in items)
        self.ints = all(item is int for item in items)
        if not all(item.flat for item in items if isinstance(item, _Tuple)):
            raise Refused("its pickle nests tuples without need")


class _Dict:
    """``keys``: those set so far; ``closed``: whether setting more is refused."""

    def __init__(self, ordered: bool):
        self.ordered, self.closed, self.keys = ordered, False, []


class _Global(str):
    """A global, as "module name"."""


_STORAGE, _TENSOR = object(), object()


class _Stack:
    """The unpickler's stack; items below the last mark are out of reach."""

    def __init__(self):
        self._items, self._marks = [], []

    def push(self, item: object) -> None:
        self._items.append(item)

    def mark(self) -> None:
        self._marks.append(len(self._items))

    def top(self) -> object:
        item = self.take(1)[0]
        self.push(item)
        return item

    def take(self, count: int | None) -> list:
        """Pop the last ``count`` objects, or with None all above the last mark, and the mark."""
        if count is None and not self._marks:
            raise Refused("its pickle takes more than it has")
        floor = self._marks[-1] if self._marks else 0
        start = self._marks.pop() if count is None else len(self._items) - count
        if start < floor:
            raise Refused("its pickle takes more than it has")
        items = self._items[start:]
        del self._items[start:]
        return items


def check_pickle(content: bytes) -> None:
    """Refuse every opcode and call that ``torch.save`` of a dict of tensors does not write.

    The opcodes are interpreted on types instead of objects: strings stand for themselves, numbers for their types.  What is
    accepted neither copies nor hashes an object built earlier, so unpickling takes time linear in the length.
    """
    stack, memo = _Stack(), {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in VALUES:
            stack.push(VALUES[name])
        elif name == "BINUNICODE":
            stack.push(argument)
        elif name == "PROTO":
            if argument != 2:
                raise Refused(f"expected pickle protocol 2 as torch.save writes, got {argument}")
        elif name == "GLOBAL":
            if argument not in NAMES:
                raise Refused(f"its pickle names {short_repr(argument)}, which is no plain tensor")
            stack.push(_Global(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in memo:
                raise Refused("its pickle takes more than it has")
            stack.push(memo[argument])
        elif name == "MARK":
            stack.mark()
        elif name == "EMPTY_DICT":
            stack.push(_Dict(ordered=False))
        elif name in TUPLES:
            stack.push(_Tuple(stack.take(TUPLES[name])))
        elif name in ("SETITEM", "SETITEMS"):
            items = stack.take(2 if name == "SETITEM" else None)
            _set_items(items, stack.top())
        elif name == "BINPERSID":
            stack.push(_storage(*stack.take(1)))
        elif name == "REDUCE":
            stack.push(_called(*stack.take(2)))
        elif name == "BUILD":
            (state,) = stack.take(1)
            _build(state, stack.top())
        elif name != "STOP":
            raise Refused(f"its pickle uses {name}, which plain tensors do not need")


def _set_items(items: list, target: object) -> None:
    if not isinstance(target, _Dict) or target.closed or len(items) % 2:
        raise Refused("its pickle sets items of an object that is no dict of tensors")
    for key in items[::2]:
        if type(key) is not str:  # other keys may be expensive to hash
            raise Refused("its pickle has a dict whose keys are no texts")
        target.keys.append(key)


def _storage(claim: object) -> object:
    items = claim.items if isinstance(claim, _Tuple) else []
    kinds = [type(item) if isinstance(item, str) else item for item in items]
    # torch reads a storage again for every spelling of its key, and looks up entries ignoring case.
    if kinds != [str, _Global, str, str, int] or items[1] not in STORAGES or items[2] != items[2].lower():
        raise Refused("its pickle names a storage in another way than torch.save does")
    return _STORAGE


def _called(function: object, arguments: object) -> object:
    given = arguments.items if isinstance(arguments, _Tuple) else [None]  # accepted by no call below
    if not isinstance(function, _Global):
        raise Refused("its pickle calls an object that is no global")
    if function == ORDERED_DICT and given == []:
        return _Dict(ordered=True)
    hooks = given[-1] if given else None
    if isinstance(hooks, _Dict) and hooks.ordered and not hooks.keys:
        hooks.closed = True
        if function == PARAMETER and given[:-1] == [_TENSOR, bool]:
            return _TENSOR
        if function == REBUILD and len(given) == 6:
            storage, offset, size, stride, grad, _ = given
            shapes = all(isinstance(s, _Tuple) and s.ints and len(s.items) <= MAX_DIMENSIONS for s in (size, stride))
            if (storage, offset, grad) == (_STORAGE, int, bool) and shapes:
                return _TENSOR
    raise Refused(f"its pickle calls {short_repr(function)} in another way than torch.save does")


def _build(state: object, target: object) -> None:
    """Accept only the attribute ``_metadata`` of a state_dict."""
    if not isinstance(state, _Dict) or state.ordered or state.closed or state.keys != ["_metadata"]:
        raise Refused("its pickle sets attributes that no state_dict has")
    if not isinstance(target, _Dict) or not target.ordered:
        raise Refused("its pickle sets attributes that no state_dict has")
    state.closed = True
