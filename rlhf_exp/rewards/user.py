"""A reward function of the user's own: `python:module.function`.

    def function(prompts: list[str], responses: list[str]) -> list[float]: ...

The module is found as `import` finds it, the working directory included.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_exp.errors import InputError

SIGNATURE = "def {name}(prompts: list[str], responses: list[str]) -> list[float]"
Function = Callable[[list[str], list[str]], Any]


def load(name: str) -> Function:
    """The function `module.function`. InputError: no such module or function, its import fails, no function."""
    place, _, last = name.rpartition(".")
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"expected python:module.function, got python:{name}")
    module = _import(place)
    function = getattr(module, last, None)
    if function is None:
        raise InputError(f"module {place} ({_file(module)}) has no function {last}")
    if not callable(function):
        raise InputError(f"{last} in {_file(module)} is no function but {type(function).__name__}")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise InputError(f"it must be {SIGNATURE.format(name=last)} ({error})") from error
    except ValueError:  # a builtin that does not say
        pass
    return function


def _import(name: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # as `python -m` has it; the console script has its own folder instead
    importlib.invalidate_caches()  # for a file that was written while this process runs
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            reason = f"there is no module {error.name}, neither in {folder} nor installed"
            raise InputError(reason) from error
        raise InputError(f"module {name} cannot be imported: {_why(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"module {name} cannot be imported: {_why(error)}") from error


def score(name: str, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """What the function gives, as floats. InputError: it raises, or gives anything but a finite number each."""
    function = load(name)
    try:
        given = function(list(prompts), list(responses))
    except Exception as error:
        raise InputError(f"raised {_why(error)}") from error
    try:
        values = list(given)
    except TypeError:
        raise InputError(f"must return a list of numbers, returned {_shown(given)}") from None
    if len(values) != len(responses):
        raise InputError(f"returned {len(values)} scores for {len(responses)} responses")
    return [_number(i, value, responses[i]) for i, value in enumerate(values)]


def _number(place: int, value: Any, response: str) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        number = float(value)  # numpy's and torch's scalars too
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if number - number != 0:  # nan or infinite
        raise InputError(
            f"must return finite numbers, returned {_shown(value)} at place {place}, for {_shown(response)}"
        )
    return number


def files(name: str) -> list[Path]:
    """The source files that say what the function does: of the module that is named and of where it is defined.

    What these import is not looked at.
    """
    function = inspect.unwrap(load(name))
    modules = [sys.modules[name.rpartition(".")[0]]]
    if (home := sys.modules.get(getattr(function, "__module__", None) or "")) not in (None, modules[0]):
        modules.append(home)
    return [Path(file) for module in modules if (file := getattr(module, "__file__", None))]


def _file(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or "a folder without __init__.py")


def _why(error: BaseException) -> str:
    """An exception in one line, with the place where it was raised."""
    said = " ".join(str(error).split())[:200]
    if isinstance(error, SyntaxError):
        said = f"{error.msg} ({error.filename}, line {error.lineno})"
    else:
        # the innermost line of the user's own: not of what it calls, nor of the import machinery
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith("<")]
        said = f"{said} ({own[-1].filename}, line {own[-1].lineno})"
    return f"{type(error).__name__}: {said}"


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
