"""The public names of vespera-exec, each imported when it is first asked for.

Importing the package itself costs nothing: the bridge and the command line start with it.
"""

__version__ = "0.1.0"

# name -> module that defines it
_EXPORTS: dict[str, str] = {}

# Named for its readers only; the list itself is `_EXPORTS`.
__all__ = ["__version__", *sorted(_EXPORTS)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value: object = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
