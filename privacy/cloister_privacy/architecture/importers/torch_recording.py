"""What a torch module does to its inputs, recorded while it runs on a small batch. Knows what tensors come from; maps nothing.

Running sees what symbolic tracing cannot: lengths and shapes are numbers, so that loops and choices over them are simply taken.
A choice over what a tensor holds is refused, because other rows would choose otherwise.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Place, TokensFound, Value
from cloister_privacy.architecture.importers.operations import state_of_direction
from cloister_privacy.architecture.importers.origins import MOVED, Moved, Origin, States, Unread
from cloister_privacy.architecture.importers.torch_weights import Learned, Owners

__all__ = ["Call", "Handler", "Recorder"]

_HARMLESS = re.compile(
    "shape|size|dim|ndim|ndimension|len|numel|nelement|stride|storage_offset|device|get_device|dtype|layout|itemsize|element_size|"
    "nbytes|requires_grad|grad|grad_fn|retain_grad|register_hook|names|has_names|format|repr|hash|type|data_ptr|version|"
    "is_(leaf|cuda|cpu|mps|xpu|meta|sparse|nested|quantized|contiguous|floating_point|complex|signed|inference|same_size|conj|neg)"
)
"""What may be asked of a tensor without looking at its numbers."""

_ALIASES = {
    **dict.fromkeys(("radd", "iadd"), "add"),
    **dict.fromkeys(("rmul", "imul", "multiply"), "mul"),
    **dict.fromkeys(("isub", "subtract"), "sub"),
    **dict.fromkeys(("truediv", "itruediv", "idiv", "true_divide", "divide"), "div"),
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    **dict.fromkeys(("concat", "concatenate"), "cat"),
    **dict.fromkeys(("bitwise_not", "logical_not"), "invert"),
    **dict.fromkeys(("mm", "bmm", "rmatmul"), "matmul"),
    "negative": "neg",
    "not_equal": "ne",
    "moveaxis": "movedim",
    "greater": "gt",
}

_CREATES = re.compile("(zeros|ones|full|empty)_like|new_(zeros|ones|full|empty|tensor)")


_MOVES = ("permute", "transpose", "movedim", "mT", "getitem", "unbind", "contiguous")
"""What may read a value whose examples are not first."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call that was recorded."""

    draft: Draft
    owners: Owners
    name: str
    outs: tuple[Tensor, ...]
    """The tensors that it gave."""
    batch: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it gave, of one example."""
        return self.shape_of(self.outs[0])

    def shape_of(self, out: Tensor) -> tuple[int, ...]:
        """Raises NotMapped where the examples are not the first dimension."""
        if out.ndim == 0 or out.shape[0] != self.batch:
            raise NotMapped(
                f"{self.name} gives {list(out.shape)} of {self.batch} examples; keep the examples as the first dimension"
            )
        return tuple(out.shape[1:])


Handler = Callable[..., Any]


class Recorder(TorchFunctionMode):
    """While it is entered, what happens to the columns goes into the draft."""

    def __init__(
        self,
        draft: Draft,
        module: nn.Module,
        *,
        functions: Mapping[str, Handler],
        modules: Sequence[tuple[type[nn.Module], Handler]],
        unknown: Callable[[str], str],
    ) -> None:
        super().__init__()
        self._draft, self._module, self._owners = draft, module, Owners(module)
        self._functions, self._modules, self._unknown = functions, modules, unknown
        self._known: dict[int, tuple[Tensor, Any]] = {}
        """By id: a tensor, kept so that its id stays its own, and where it comes from."""
        self._mapped_before: dict[Any, list[Any]] = {}
        self._within: list[Place] = [Place("", type(module).__name__)]
        self._pauses = 0
        self._batch = 0
        for name, parameter in module.named_parameters():
            self._known[id(parameter)] = parameter, Learned(parameter, frozenset({name}))

    def record(self, columns: Mapping[str, Tensor], arguments: Mapping[str, str]) -> Any:
        """Run the module on these columns, `arguments` telling which of its arguments gets which; what it gives is an origin."""
        self._batch = len(next(iter(columns.values())))
        for name, tensor in columns.items():
            self._known[id(tensor)] = tensor, self._draft.column(name)
        with self._watched(), self:
            given = self._module(**{argument: columns[name] for argument, name in arguments.items()})
        return tree_map(self._origin, given)

    def untaken(self) -> list[str]:
        """Parameters that no layer took."""
        return self._owners.untaken()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        handles = []
        for path, module in self._module.named_modules():
            handler = next((each for kind, each in self._modules if type(module).forward is kind.forward), None)
            place = Place(path, type(module).__name__)
            hooked = bool(module._forward_hooks or module._forward_pre_hooks)

            def enter(module: nn.Module, args: Any, kwargs: Any, *, place: Place = place, leaf: Any = handler) -> None:
                self._within.append(place)
                self._pauses += leaf is not None

            def leave(
                module: nn.Module,
                args: Any,
                kwargs: Any,
                out: Any,
                *,
                place: Place = place,
                leaf: Any = handler,
                hooked: bool = hooked,
            ) -> Any:
                if leaf is not None and self._pauses == 1:
                    out = self._mapped(str(place), self._leaf(leaf, module, hooked), args, kwargs, out)
                self._pauses -= leaf is not None
                self._within.pop()
                return out

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leaf(self, handler: Handler, module: nn.Module, hooked: bool) -> Handler:
        def run(call: Call, *args: Any, **kwargs: Any) -> Any:
            if hooked:
                raise NotMapped("has forward hooks, which may change what it gives; remove them first")
            return handler(call, module, *args, **kwargs)

        return run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pauses:
            return func(*args, **kwargs)
        origins = [each for each in map(self._origin, tree_leaves((args, kwargs))) if not isinstance(each, Tensor)]
        read = [each for each in origins if isinstance(each, Origin)]
        learned = [each for each in origins if isinstance(each, Learned)]
        name = _name(func)
        if name == "embedding":
            self._require_tokens(args, kwargs)
        before = {id(each): each._version for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        out = func(*args, **kwargs)
        if not read and not learned:
            return out
        if not any(isinstance(each, Tensor) for each in tree_leaves(out)):
            if read and not _HARMLESS.fullmatch(name):
                self._refuse_choice(name)
            return out
        if _CREATES.fullmatch(name):
            return out
        if not read:
            for each in tree_leaves(out):
                self._keep(each, learned[0].after(name, each) if len(learned) == 1 else Learned.computed(learned, each))
            return out
        handler = self._functions.get(name) or self._no_handler(name)
        return self._mapped(name, handler, args, kwargs, out, before=before)

    def _require_tokens(self, args: Any, kwargs: Any) -> None:
        """Before a table is asked with numbers: they are indices, then."""
        asked = self._origin(args[0] if args else kwargs.get("input"))
        if isinstance(asked, Value) and isinstance(asked.key, str) and asked.key not in self._draft.tokens:
            raise TokensFound(asked.key)

    def _no_handler(self, name: str) -> Handler:
        def run(call: Call, *args: Any, **kwargs: Any) -> Any:
            raise NotMapped(self._unknown(name))

        return run

    def _refuse_choice(self, name: str) -> None:
        self._draft.place = self._place(name)
        self._draft.refuse(
            "writes into a part of a tensor; put the parts together with torch.cat"
            if name == "setitem"
            else f"{name} looks at the numbers that a tensor holds, so what the network does may depend on its input; write it "
            "without that choice"
        )
        self._draft.raise_problems()

    def _place(self, name: str) -> Place:
        path, kind = self._within[-1].path, self._within[-1].kind
        module = self._module.get_submodule(path)
        return Place(path, kind if type(module).__module__.startswith("torch.nn.modules") else name)

    def _mapped(
        self, name: str, handler: Handler, args: Any, kwargs: Any, out: Any, *, before: Mapping[int, int] | None = None
    ) -> Any:
        """Let the handler map a call, and keep where what it gave comes from.

        Gives `out`. A tensor that went in and came out as it was comes out as a view of itself: one object has one origin. One
        that was written to has a new origin; `before` holds the versions that the tensors had.
        """
        self._pauses += 1
        outs = tuple(each for each in tree_leaves(out) if isinstance(each, Tensor))
        self._draft.place = self._place(name)
        try:
            read, named = tree_map(self._origin, (args, kwargs))
            origins = self._once(name, handler, read, named, outs)
            for tensor, origin in zip(outs, origins, strict=True):
                if isinstance(origin, Value) and (self._batch, *origin.shape) != tuple(tensor.shape):
                    raise NotMapped(
                        f"{name} gives {list(tensor.shape)} of {self._batch} examples, and not {origin.shape} of each"
                    )
        except NotMapped as exc:
            if str(exc):
                self._draft.refuse(str(exc))
            origins = [self._instead(each) for each in outs]
        fresh = []
        for tensor, origin in zip(outs, origins, strict=True):
            if (before or {}).get(id(tensor)) == tensor._version:
                tensor = tensor.view_as(tensor)  # noqa: PLW2901 (another object, the same numbers)
            self._keep(tensor, origin)
            fresh.append(tensor)
        self._pauses -= 1
        rest = iter(fresh)
        return tree_map(lambda each: next(rest) if isinstance(each, Tensor) else each, out)

    def _keep(self, tensor: Any, origin: Any) -> None:
        if isinstance(tensor, Tensor):
            self._known[id(tensor)] = tensor, origin

    def _once(self, name: str, handler: Handler, args: Any, kwargs: Any, outs: tuple[Tensor, ...]) -> list[Any]:
        """What a call gave comes from. The same layer, asked the same again, answers the same, and is one layer."""
        if name != "cat":
            args, kwargs = tree_map(self._alone, (args, kwargs))
        leaves = tree_leaves((args, kwargs))
        for each in leaves:
            if isinstance(each, Unread):
                raise NotMapped(f"reads {each.what}, which the language does not give" if each.what else "")
            if isinstance(each, Moved) and name not in _MOVES:
                raise NotMapped(MOVED)
        key = name, tuple(id(each.tensor) if isinstance(each, Learned) else repr(each) for each in leaves)
        has_weights = any(isinstance(each, Learned) for each in leaves)
        if has_weights and key in self._mapped_before:
            return self._mapped_before[key]
        found = _bound(handler, Call(self._draft, self._owners, name, outs, self._batch), args, kwargs)()
        origins: list[Any] = found if isinstance(found, list) else [found]
        if has_weights and not any(isinstance(each, Tensor) for each in leaves):
            self._mapped_before[key] = origins
        return origins

    def _alone(self, given: Any) -> Any:
        """The state of one direction, read by itself."""
        is_chosen = isinstance(given, States) and given.chosen is not None
        return state_of_direction(self._draft, given) if is_chosen else given

    def _instead(self, tensor: Tensor) -> Any:
        if tensor.ndim and tensor.shape[0] == self._batch:
            return self._draft.placeholder(tuple(tensor.shape[1:]))
        return Unread()

    def _origin(self, given: Any) -> Any:
        if isinstance(given, Tensor) and id(given) in self._known:
            return self._known[id(given)][1]
        return given


def _bound(handler: Handler, call: Call, args: Any, kwargs: Any) -> Callable[[], Any]:
    try:
        inspect.signature(handler).bind(call, *args, **kwargs)
    except TypeError:
        told = ", ".join(kwargs) or "its arguments"
        raise NotMapped(f"{call.name} is called with options that the language has not, among {told}") from None
    return lambda: handler(call, *args, **kwargs)


def _name(func: Any) -> str:
    """`relu` of torch.relu, Tensor.relu_ and functional.relu."""
    told = (resolve_name(func) or getattr(func, "__name__", "") or "an unknown function").split(".")
    name = told[-2] if told[-1] in ("__get__", "__set__") and len(told) > 1 else told[-1]
    name = name.strip("_")
    return _ALIASES.get(name, name)
