"""Counts the steps of a learner's file: the lines that it runs, and the items that its lists and deques move or read.

A clock would say how busy the machine is; this says the same on every machine. The file is loaded once more with its
lists (`list(...)`, `[...]`, comprehensions) and deques replaced by ones that count; so are `min`, `max`, `sum` and
`sorted`, which read all that they get. What a set or a dict does in one call (a union, say) counts as nothing.
"""

import ast
import collections
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from types import CodeType, FrameType, ModuleType
from typing import Any

from quire.course.checking import Failed

_COUNTED = "_counted_list"


class Work:
    """Counts inside `with`, in the file at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lines = 0
        self._counts = False
        self.items: Counter[str] = Counter()
        """What was called -> items that it moved or read."""

    @property
    def total(self) -> int:
        """Lines and items."""
        return self._lines + self.items.total()

    def add(self, name: str, count: int) -> None:
        """So many items."""
        if self._counts and count > 0:
            self.items[name] += count

    def __enter__(self) -> None:
        self._counts = True
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._counts = False

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != self._path:
            return None
        self._lines += event == "line"  # a comprehension runs its line once for each item
        return self._trace


class _Wrapped(ast.NodeTransformer):
    """`[...]` and comprehensions become counted lists."""

    def visit_List(self, node: ast.List) -> ast.AST:
        self.generic_visit(node)
        return _call(node) if isinstance(node.ctx, ast.Load) else node

    def visit_ListComp(self, node: ast.ListComp) -> ast.AST:
        self.generic_visit(node)
        return _call(node)


def _call(node: ast.expr) -> ast.AST:
    return ast.copy_location(ast.Call(ast.Name(_COUNTED, ast.Load()), [node], []), node)


class _Loader(SourceFileLoader):
    """Loads a file with what counts in place of what does not."""

    def __init__(self, path: str, work: Work) -> None:
        super().__init__("learner", path)
        self._work = work

    def get_code(self, fullname: str) -> CodeType:
        """Of the source, never what a byte code file keeps: its lists do not count."""
        tree = ast.parse(self.get_data(self.path), self.path)
        return self.source_to_code(ast.fix_missing_locations(_Wrapped().visit(tree)), self.path)

    def exec_module(self, module: ModuleType) -> None:
        counted = _list_of(self._work)
        module.__dict__.update({"list": counted, _COUNTED: counted, **_readers(self._work)})
        before = collections.deque
        vars(collections)["deque"] = _deque_of(self._work)
        try:
            super().exec_module(module)
        finally:
            vars(collections)["deque"] = before


def load_counted(module: ModuleType, work: Work) -> ModuleType:
    """The file of a module, loaded anew so that it counts. Raises `Failed` for what is no file."""
    path = module.__file__
    if path is None:
        raise Failed("its steps cannot be counted: it has no file")
    loader = _Loader(path, work)
    spec = importlib.util.spec_from_loader("learner", loader)
    if spec is None:
        raise Failed("its steps cannot be counted: it cannot be loaded again")
    counted = importlib.util.module_from_spec(spec)
    loader.exec_module(counted)
    return counted


def _readers(work: Work) -> dict[str, Callable[..., Any]]:
    def reading(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def read(*values: Any, **words: Any) -> Any:
            if len(values) == 1 and hasattr(values[0], "__len__"):
                work.add(f"{name}()", len(values[0]))
            return function(*values, **words)

        return read

    return {one.__name__: reading(one.__name__, one) for one in (min, max, sum, sorted)}


def _all(kind: type, work: Work, names: str) -> dict[str, Callable[..., Any]]:
    """Methods that read or move all items."""

    def costing(name: str) -> Callable[..., Any]:
        def method(self: Any, *values: Any, **words: Any) -> Any:
            work.add(f"{kind.__name__}.{name}", len(self))
            return getattr(kind, name)(self, *values, **words)

        return method

    return {name: costing(name) for name in names.split()}


def _list_of(work: Work) -> type[Any]:
    """A list that counts: behind an item that leaves or comes all move."""

    def make(self: Any, *items: Any) -> None:
        list.__init__(self, *items)
        work.add("list()", len(self))

    def pop(self: Any, place: Any = -1) -> Any:
        work.add(f"list.pop({place})", _behind(self, place))
        return list.pop(self, place)

    def insert(self: Any, place: Any, item: Any) -> None:
        work.add("list.insert", _behind(self, place) + 1)
        list.insert(self, place, item)

    def get(self: Any, place: Any) -> Any:
        found = list.__getitem__(self, place)
        if not isinstance(place, slice):
            return found
        work.add("a slice of a list", len(found))
        return type(self)(found)

    def delete(self: Any, place: Any) -> None:
        work.add("del of a list's items", len(self) if isinstance(place, slice) else _behind(self, place))
        list.__delitem__(self, place)

    def iterate(self: Any) -> Iterator[Any]:
        for item in list.__iter__(self):
            work.add("reading a list", 1)
            yield item

    methods = _all(list, work, "remove index count copy reverse sort __contains__ __add__ __mul__ __eq__")
    special = {"__init__": make, "__getitem__": get, "__delitem__": delete, "__iter__": iterate}
    return type("Counted", (list,), {**methods, "pop": pop, "insert": insert, **special})


def _deque_of(work: Work) -> type[Any]:
    """A deque that counts: its middle is far from both of its ends."""
    kind = collections.deque

    def iterate(self: Any) -> Iterator[Any]:
        for item in kind.__iter__(self):
            work.add("reading a deque", 1)
            yield item

    methods = _all(kind, work, "remove index count copy reverse insert rotate __contains__ __delitem__")
    return type("Counted", (kind,), {**methods, "__iter__": iterate})


def _behind(items: list[Any], place: Any) -> int:
    number: int = place.__index__()
    return max(0, len(items) - 1 - number if number >= 0 else -1 - number)
