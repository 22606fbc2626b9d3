"""How a callable of a role is found and what it is called with; standard library only, the child imports it too.

The first parameter decides. Named `task`, or followed by others without defaults: the call is
`(task, context, progress)`, as many of them as fit. Otherwise the call is `(context)`, and `()`
where nothing is taken. `progress(percentage, message="")` is short for `context.progress`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

ENTRY_POINTS: Final = "vespera_exec.callables"
MAIN_NAME: Final = "__vespera_main__"


class TargetNotFound(Exception):
    """A target names nothing that can be called."""

    failure_code = "TARGET_NOT_FOUND"


def resolve(target: str, python_path: str | None = None) -> Callable[..., Any]:
    """The callable behind `module:name` or an entry point of the group `vespera_exec.callables`.

    `python_path` is the script for a target in `__main__`, which is then loaded under another name
    so that its `if __name__ == "__main__"` does not run.

    Raises:
        TargetNotFound: no such module, attribute or entry point.
    """
    module, colon, name = target.partition(":")
    if not colon:
        return _entry_point(target)
    try:
        found: Any = _script(python_path) if module == "__main__" else importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        # A module that the callable's own module misses is that module's fault, told by its traceback.
        if error.name and module != error.name and not module.startswith(error.name + "."):
            raise
        raise TargetNotFound(f"{target}: there is no module {error.name!r} for {sys.executable}") from None
    except AttributeError as error:
        raise TargetNotFound(f"{target}: {error}") from None
    if not callable(found):
        raise TargetNotFound(f"{target} is a {type(found).__name__} and cannot be called")
    return found


def arguments(fn: Callable[..., Any], task: Any, context: Any, progress: Any) -> tuple[Any, ...]:
    """What to call `fn` with."""
    import inspect

    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return (context,)
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return task, context, progress
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    needed = sum(each.default is each.empty for each in positional)
    if positional and (positional[0].name == "task" or needed > 1):
        return (task, context, progress)[: len(positional)]
    return (context,) if positional else ()


def _entry_point(name: str) -> Callable[..., Any]:
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS, name=name):
        return entry.load()
    raise TargetNotFound(f"{name!r} is neither module:callable nor an entry point in the group {ENTRY_POINTS}")


def _script(path: str | None) -> Any:
    loaded = sys.modules.get(MAIN_NAME) or sys.modules["__main__"]
    if path is None or getattr(loaded, "__file__", None) == path:
        return loaded
    spec = importlib.util.spec_from_file_location(MAIN_NAME, path)
    if spec is None or spec.loader is None:
        raise TargetNotFound(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MAIN_NAME] = module
    spec.loader.exec_module(module)
    return module
