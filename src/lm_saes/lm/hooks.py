"""Reading and replacing tensors inside a module tree while it runs. Hooks never outlive the call, weights never change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lm_saes.errors import HookPointError, LanguageModelError
from lm_saes.lm.hook_points import Site

Edit = Callable[[Tensor], Tensor]


class _AllCaptured(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


def _first(value: Any) -> Tensor | None:
    """The first tensor in a module's output or positional inputs."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return next((tensor for item in items if (tensor := _first(item)) is not None), None)


def _with_first(value: Any, old: Tensor, new: Tensor) -> Any:
    """`value` with the tensor `old` in it replaced by `new`; containers keep their type, the caller's are not changed."""
    if value is old:
        return new
    if isinstance(value, tuple):
        items = [_with_first(item, old, new) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_with_first(item, old, new) for item in value]
    if isinstance(value, Mapping):
        return type(value)(**{key: _with_first(item, old, new) for key, item in value.items()})
    return value


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A module's main input: the first positional tensor, else `hidden_states`, else the first keyword that holds a tensor."""
    first = _first(args)
    return first if first is not None else _first(kwargs.get("hidden_states", kwargs))


def capture(model: nn.Module, sites: Mapping[str, Site], run: Callable[[], Any]) -> dict[str, Tensor]:
    """Run `run()` and return the tensors at `sites` (copies, under the same keys). The forward ends as soon as the last of them has been seen.

    A module that runs more than once is read the first time.

    Raises:
        HookPointError: a module was not run, or passed no tensor.
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor | None) -> None:
        if name in captured:
            return
        if tensor is None:
            raise HookPointError(f"'{name}' passes no tensor; choose a module whose first {sites[name].place}put is one")
        captured[name] = tensor.detach().clone()  # a later layer may add into the same memory
        if len(captured) == len(sites):
            raise _AllCaptured

    with ExitStack() as stack:
        for name, site in sites.items():
            module = model.get_submodule(site.module)
            if site.place == "in":
                handle = module.register_forward_pre_hook(lambda _, args, kwargs, name=name: keep(name, _input(args, kwargs)), with_kwargs=True)
            else:
                handle = module.register_forward_hook(lambda _, __, output, name=name: keep(name, _first(output)))
            stack.callback(handle.remove)
        with suppress(_AllCaptured):
            run()
    missing = [name for name in sites if name not in captured]
    if missing:
        raise HookPointError(f"the forward pass never reached '{missing[0]}'; choose a module that runs on plain text")
    return {name: captured[name] for name in sites}


@contextmanager
def edited(model: nn.Module, edits: Mapping[str, tuple[Site, Edit]]) -> Iterator[None]:
    """While open, the tensor at each site is replaced by what its function returns for it. Several edits of one tensor apply in order.

    Raises:
        LanguageModelError: a function returned another shape.
    """

    def changed(name: str, edit: Edit, tensor: Tensor | None) -> tuple[Tensor, Tensor]:
        if tensor is None:
            raise HookPointError(f"'{name}' passes no tensor that could be edited")
        new = edit(tensor)
        if new.shape != tensor.shape:
            raise LanguageModelError(f"the edit at '{name}' must keep the shape {tuple(tensor.shape)}, got {tuple(new.shape)}")
        return tensor, new.to(device=tensor.device, dtype=tensor.dtype)

    def edit_output(name: str, edit: Edit) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            return _with_first(output, *changed(name, edit, _first(output)))

        return hook

    def edit_input(name: str, edit: Edit, differences: list[Tensor]) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            old, new = changed(name, edit, _input(args, kwargs))
            differences.append(new - old)
            return _with_first(args, old, new), _with_first(kwargs, old, new)

        return hook

    def add_difference(differences: list[Tensor]) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            tensor = _first(output)
            return output if tensor is None else _with_first(output, tensor, tensor + differences.pop())

        return hook

    with ExitStack() as stack:
        for name, (site, edit) in edits.items():
            module = model.get_submodule(site.module)
            if site.place == "out":
                stack.callback(module.register_forward_hook(edit_output(name, edit)).remove)
                continue
            differences: list[Tensor] = []
            stack.callback(module.register_forward_pre_hook(edit_input(name, edit, differences), with_kwargs=True).remove)
            if site.bypass is not None:  # before any edit of the block's own output
                hook = add_difference(differences)
                stack.callback(model.get_submodule(site.bypass).register_forward_hook(hook, prepend=True).remove)
        yield


_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, no module is in training mode (dropout off); afterwards each is as it was.

    One thread at a time: hooks sit on the modules, and those of one forward would see the other's tensors.
    """
    with _turns.setdefault(model, threading.RLock()):
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
