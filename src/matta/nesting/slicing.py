"""Modules whose weights are slices of another module's parameters, read afresh at every use.

A live module is a copy of the user's module in which a parameter has become a property: reading
`linear.weight` slices the owner's parameter there and then. So it always shows the present weights,
gradients flow to the owner, and a block that activation checkpointing computes again slices again
(parameters swapped in for one call, as `torch.func.functional_call` does, are gone by then and give
wrong gradients). The optimizer, DDP and FSDP see the owner's parameters alone.

In training the slices are views. Outside training they are contiguous copies, since products with
strided weights can differ in the last bit from those of an extracted module. Tables with sparse gradients
are never copied: `sparse_tables` has their slices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from matta.errors import NestingError
from matta.nesting.copying import deep_copy
from matta.nesting.layout import Axis
from matta.nesting.slice_gradients import GivenAway, adding_at_once
from matta.nesting.sparse_tables import SparseSlice, lookup_bags, may_look_up

_SLICES = "_live_slices"
_CONVERSIONS = ("to", "type", "half", "float", "double", "bfloat16", "cpu", "cuda", "requires_grad_")


@final
class LiveSlice:
    """A slice of one parameter of another module.

    `axes` has one entry for each axis of the parameter; `detach` cuts the gradient. With `adds_at_once` the gradient
    is added to the parameter's as soon as it is there, not when all that read the parameter have theirs.
    """

    def __init__(self, owner: nn.Module, name: str, axes: tuple[Axis, ...], *, detach: bool = False) -> None:
        self.owner, self.name, self.axes, self.detach = owner, name, axes, detach
        self.adds_at_once = False
        self.given_away = GivenAway()
        self._growing = tuple((dim, axis) for dim, axis in enumerate(axes) if axis.grows)

    @property
    def key(self) -> tuple[int, tuple[Axis, ...]]:
        """What two slices share when they are the same part of the same parameter, be it a tied one."""
        return id(getattr(self.owner, self.name)), self.axes

    @property
    def is_sharded(self) -> bool:
        """Whether the owner's parameter is divided among processes at present."""
        return hasattr(getattr(self.owner, self.name), "full_tensor")

    def outline(self) -> Tensor:
        """A tensor of the slice's shape and type without contents."""
        owner: Tensor = getattr(self.owner, self.name)
        return torch.empty([axis.student_size for axis in self.axes], dtype=owner.dtype, device="meta")

    def read(self, *, contiguous: bool, sparse: bool = False) -> Tensor:
        """The present weights: a view in training, a contiguous copy otherwise; of a `sparse` table always a view."""
        tensor = _whole(getattr(self.owner, self.name))
        if self.adds_at_once and tensor.requires_grad and torch.is_grad_enabled():
            tensor = adding_at_once(tensor)
        if sparse and self._growing:
            tensor = SparseSlice.apply(tensor, self.axes)
            return tensor.detach() if self.detach else tensor
        for dim, axis in self._growing:
            tensor = axis.take(tensor, dim)
        if self.detach:
            tensor = tensor.detach()
        return tensor.contiguous() if contiguous else tensor

    def as_parameter(self) -> Tensor:
        """The present weights without their graph, that say of themselves whether they train, as a parameter does.

        Without gradients, torch multiplies a transposed input in another order by weights that ask for none.
        """
        value, source = self.read(contiguous=True), getattr(self.owner, self.name)
        if value is source or not source.requires_grad or self.detach:
            return value  # a view says that it asks for gradients, but without them has no place where they would go
        try:
            return value.detach().requires_grad_()
        except RuntimeError:  # in torch.vmap nothing can ask for a gradient
            return value

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Put weights of the slice's shape into the owner's parameter."""
        tensor: Tensor = getattr(self.owner, self.name)
        write_slice(tensor, value, self.axes)

    @torch.no_grad()
    def own(self) -> nn.Parameter:
        """A parameter with a copy of the present weights."""
        value = self.read(contiguous=True).detach().clone(memory_format=torch.contiguous_format)
        source: nn.Parameter = getattr(self.owner, self.name)
        return nn.Parameter(value, requires_grad=source.requires_grad and not self.detach)

    @torch.no_grad()
    def shared(self) -> nn.Parameter:
        """A parameter without gradient over the owner's memory, where one view can show the slice; else a copy.

        Convolutions copy strided weights at each call, so that kernels are copied once and for all.
        """
        value = self.read(contiguous=False).detach()
        return nn.Parameter(value.contiguous() if value.ndim > 2 else value, requires_grad=False)


def _whole(tensor: Any) -> Tensor:
    """The tensor, gathered from all processes if it is sharded.

    Raises:
        NestingError: it is sharded in a step that trains it.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NestingError(
            f"a live slice of a sharded parameter of shape {tuple(tensor.shape)} is read while nothing gathers it; "
            f"expected to run the CoTraining that was sharded (fully_shard or matta.shard), and not the Student alone"
        )
    return tensor.full_tensor()


@torch.no_grad()
def write_slice(target: Tensor, value: Tensor, axes: Sequence[Axis]) -> None:
    """Write the Student's parameter into its slice of the TA's."""
    index = []
    for dim, axis in enumerate(axes):
        positions = torch.tensor(axis.positions(), dtype=torch.long, device=target.device)
        index.append(positions.view([-1 if i == dim else 1 for i in range(len(axes))]))
    target[tuple(index)] = value.to(target.device, target.dtype)


def bind(module: nn.Module, slices: Mapping[str, LiveSlice]) -> None:
    """Make every module in `module` live: `slices` maps parameter names to what they read."""
    by_owner: dict[str, dict[str, LiveSlice]] = {}
    for name, live in slices.items():
        path, _, leaf = name.rpartition(".")
        by_owner.setdefault(path, {})[leaf] = live
    for path, part in list(module.named_modules()):
        mine = by_owner.get(path, {})
        for leaf in mine:
            part._parameters[leaf] = None
        if isinstance(part, nn.RNNBase):
            part.__dict__.pop("_flat_weights", None)
        _refuse_hidden_parameters(path, part)
        part.__dict__[_SLICES] = mine
        part.__class__ = _live_class(type(part), tuple(mine))


def _refuse_hidden_parameters(path: str, module: nn.Module) -> None:
    for attribute, value in module.__dict__.items():
        if attribute in ("_parameters", "_buffers", "_modules"):
            continue
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        if isinstance(value, nn.Parameter) or any(isinstance(part, nn.Parameter) for part in parts):
            raise NestingError(
                f"{path or type(module).__name__} keeps parameters in its attribute {attribute!r}, where they "
                f"cannot be replaced by slices; keep them in a ParameterList or read them by their names"
            )


def is_live(module: nn.Module) -> bool:
    """Whether the weights of `module` are slices of another one's."""
    return _SLICES in module.__dict__


def user_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of a live one that of which it was made."""
    return type(module).__mro__[1] if is_live(module) else type(module)


def slices_of(module: nn.Module) -> dict[str, LiveSlice]:
    """What the parameters of a live module read, by name; private ones are left out."""
    return {
        f"{path}.{name}" if path else name: live
        for path, part in module.named_modules()
        for name, live in part.__dict__.get(_SLICES, {}).items()
    }


def skeleton(module: nn.Module, *, keep_own: bool = False) -> nn.Module:
    """A plain copy of a live module's structure: its classes and buffers, nothing where slices were.

    Parameters of its own are copied as well, unless `keep_own` keeps the very same ones.
    """
    memo: dict[int, Any] = {id(part.__dict__[_SLICES]): {} for part in module.modules() if is_live(part)}
    if keep_own:
        memo |= {id(own): own for part in module.modules() for own in part._parameters.values() if own is not None}
    made = deep_copy(module, memo)
    for part, plain in zip(list(module.modules()), list(made.modules()), strict=True):
        if is_live(part):  # a forward may have put a new module among them, as BigBird's does
            plain.__class__ = user_class(part)
        plain.__dict__.pop(_SLICES, None)  # gone where a class copies itself, as the layers of einops do
    return made


def materialize(module: nn.Module) -> nn.Module:
    """A plain copy of a live module: of its classes, with weights of its own, tied as they were."""
    return _plain(skeleton(module), module, LiveSlice.own, {})


def show(module: nn.Module, shown: dict[Any, nn.Parameter]) -> nn.Module:
    """A plain module like a live one, over the same memory (see `LiveSlice.shared`), for inference alone.

    `shown` keeps the parameters that were made, so that modules of several sizes share those that are copies.
    """
    has_recurrence = any(isinstance(part, nn.RNNBase) for part in module.modules())
    return _plain(skeleton(module, keep_own=True), module, LiveSlice.own if has_recurrence else LiveSlice.shared, shown)


def _plain(
    made: nn.Module, module: nn.Module, weights: Callable[[LiveSlice], nn.Parameter], tied: dict[Any, nn.Parameter]
) -> nn.Module:
    """The skeleton of a live module with parameters in the places of its slices; `tied` has those made before."""
    for name, live in slices_of(module).items():
        if live.key not in tied:
            tied[live.key] = weights(live)
        path, _, leaf = name.rpartition(".")
        made.get_submodule(path)._parameters[leaf] = tied[live.key]
    for part in made.modules():
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
    return made


def live_parameters(module: nn.Module, *, once: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The present weights of a live module by name, in the order of a plain one: tied ones once, or as one tensor.

    Slices of sharded parameters have no contents here: what asks for names and shapes must not wait for all processes.
    """
    seen: set[Any] = set()
    tied: dict[Any, Tensor] = {}
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        slices: dict[str, LiveSlice] = part.__dict__.get(_SLICES, {})
        for name in dict.fromkeys((*part._parameters, *slices)):
            tensor, live = part._parameters.get(name), slices.get(name)
            key: Any = id(tensor) if tensor is not None else live and live.key
            if key is not None and not (once and key in seen):
                seen.add(key)
                if tensor is None and live is not None and key not in tied:
                    tied[key] = live.outline() if live.is_sharded else live.given_away.note(getattr(part, name))
                yield prefix + name, tied[key] if tensor is None else tensor


def _read(name: str) -> Callable[[nn.Module], Tensor]:
    def read(self: nn.Module) -> Tensor:
        given: Tensor | None = self._parameters.get(name)
        if given is not None:  # for one call, by torch.func.functional_call
            return given
        live: LiveSlice | None = self.__dict__[_SLICES].get(name)
        if live is None:  # while it is being copied
            raise AttributeError(name)
        is_sparse = may_look_up(self, live.axes)
        if torch.is_grad_enabled() and (given := live.given_away.in_backward()) is not None:
            return given
        if is_sparse or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return live.read(contiguous=not (self.training and torch.is_grad_enabled()), sparse=is_sparse)
        return live.as_parameter()

    return read


def _look_up_bags(self: nn.EmbeddingBag, *args: Any, **options: Any) -> Tensor:
    live: LiveSlice | None = self.__dict__[_SLICES].get("weight")
    if live is None or not self.sparse or self._parameters.get("weight") is not None:
        return nn.EmbeddingBag.forward(self, *args, **options)
    table: Tensor = getattr(live.owner, live.name)
    return lookup_bags(self, table.detach() if live.detach else table, live.axes, *args, **options)


def _flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _live_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base` under the same name, with a property for each sliced parameter."""
    if (base, names) not in _LIVE_CLASSES:
        body: dict[str, Any] = {name: property(_read(name)) for name in names}
        body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body |= {"named_parameters": _named_parameters, "__reduce_ex__": _reduce}
        body |= {} if hasattr(base, "__deepcopy__") else {"__deepcopy__": _deep_copy}
        body |= {"register_parameter": _register_parameter}
        body |= {name: _converting(name) for name in _CONVERSIONS}
        body |= {"_save_to_state_dict": _save_to_state_dict, "_load_from_state_dict": _load_from_state_dict}
        if base.forward is nn.EmbeddingBag.forward:
            body["forward"] = _look_up_bags
        if issubclass(base, nn.RNNBase):  # it keeps a list of its weights beside them
            body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        _LIVE_CLASSES[base, names] = type(base.__name__, (base,), body)
    return _LIVE_CLASSES[base, names]


_LIVE_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _named_parameters(
    self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """What a live module answers when it is asked for all of its weights.

    Its parents see no parameter of it but private ones, and so do DDP and FSDP, which ask module by module.
    """
    own = ((name, each) for name, each in self._parameters.items() if each is not None)
    for name, tensor in live_parameters(self, once=remove_duplicate) if recurse else own:
        yield (f"{prefix}.{name}" if prefix else name), tensor


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    if name in self.__dict__.get(_SLICES, {}) and param is not None:
        raise NestingError(
            f"received a parameter in the place of {name!r}, which is a slice of the TA's; expected its values: "
            f"nested.student.load_state_dict(...) writes them into the TA; matta.extract(nested) has parameters"
        )
    nn.Module.register_parameter(self, name, param)


def _converting(name: str) -> Callable[..., nn.Module]:
    """`nn.Module.to` and the like, refused where they would leave the slices, which are the TA's, as they are."""

    def convert(self: nn.Module, *args: Any, **options: Any) -> nn.Module:
        sources = [getattr(live.owner, live.name) for live in slices_of(self).values()]
        for dtype, device in {(source.dtype, source.device) for source in sources}:
            one = nn.ParameterList([torch.empty(0, dtype=dtype, device=device)])
            getattr(one, name)(*args, **options)
            if (one[0].dtype, one[0].device, one[0].requires_grad) != (dtype, device, True):
                raise NestingError(
                    f"received {name}(...) for a live {type(self).__name__}, whose weights are slices of the TA's, "
                    f"{dtype} on {device}; expected it for the nesting or the TA, or for what matta.extract gives"
                )
        result: nn.Module = getattr(super(type(self), self), name)(*args, **options)
        return result

    return convert


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Pickle the user's class and the names, from which the live class is made again, and the state that it gives."""
    return _new_live, (user_class(self), tuple(self.__dict__.get(_SLICES, ()))), self.__getstate__()


def _deep_copy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Live beside a copy of the owner, plain alone: AveragedModel averages parameters, and a live module has none."""
    if not memo:
        return materialize(self)
    made = memo[id(self)] = _new_live(user_class(self), tuple(self.__dict__.get(_SLICES, ())))
    made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
    return made


def _new_live(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    live = _live_class(base, names)
    return live.__new__(live)


def _save_to_state_dict(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    super(type(self), self)._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
    for name, live in self.__dict__.get(_SLICES, {}).items():
        tensor = live.outline() if live.is_sharded else getattr(self, name)
        destination[prefix + name] = tensor if keep_vars else tensor.detach()


@torch.no_grad()
def _load_from_state_dict(
    self: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
) -> None:
    """Weights that are loaded into a live module are written into the owner's."""
    unexpected, errors = rest
    taken: set[str] = set()
    for name, live in self.__dict__.get(_SLICES, {}).items():
        value = state.get(prefix + name)
        if value is None:
            missing.extend([prefix + name] if strict else [])
        elif value.shape != getattr(self, name).shape:
            errors.append(
                f"size mismatch for {prefix + name}: {tuple(value.shape)}, {tuple(getattr(self, name).shape)}"
            )
        else:
            live.write(value)
        taken.add(prefix + name)
    others = {key: value for key, value in state.items() if key not in taken}
    base: Any = super(type(self), self)
    base._load_from_state_dict(others, prefix, metadata, strict, missing, unexpected, errors)
