"""Search spaces by name; a plug-in is named as `package.module:Class` and so registers itself."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from lgcnet_fast.config import explain
from lgcnet_fast.errors import ConfigError, UserError
from lgcnet_fast.space.base import SearchSpace
from lgcnet_fast.space.gas import GAS
from lgcnet_fast.space.lgcnet import LGCNet

_SPACES: dict[str, type[SearchSpace]] = {LGCNet.name: LGCNet, GAS.name: GAS}


def registered_spaces() -> Mapping[str, type[SearchSpace]]:
    """Built-in spaces, and plug-ins that a configuration has named in this process."""
    return dict(_SPACES)


def get_space(name: str) -> type[SearchSpace]:
    """Class of a registered space, or of a plug-in, which is imported and registered.

    Raises `ConfigError`.
    """
    if ":" in name:
        return _plug_in(name)
    if name not in _SPACES:
        near = difflib.get_close_matches(name, _SPACES, n=1, cutoff=0)[0]
        raise ConfigError(
            f"space.name: unknown search space {name[:80]!r}; did you mean {near!r}? "
            f"A plug-in is named as package.module:Class"
        )
    return _SPACES[name]


def make_space(options: Mapping[str, Any]) -> SearchSpace:
    """The space of a configuration's `[space]` section: `name` and that space's options.

    Raises `ConfigError` naming each key at fault, with the nearest valid one.
    """
    given = dict(options)
    name = given.pop("name", LGCNet.name)
    if not isinstance(name, str):
        raise ConfigError(f"space.name: must be a string, given {name!r}")
    space = get_space(name)
    try:
        return space(space.Options.model_validate(given))
    except ValidationError as error:
        raise ConfigError(explain(error, space.Options, prefix="space.")) from None


def _plug_in(name: str) -> type[SearchSpace]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"space.name: cannot import {module_name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, SearchSpace)):
        raise ConfigError(f"space.name: {name!r} is not a class derived from SearchSpace")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"space.name: {name!r} does not implement {missing}")
    if _SPACES.setdefault(found.name, found) is not found:
        raise ConfigError(
            f"space.name: {name!r} calls itself {found.name!r}, a name that another search space "
            f"has; give the class a name of its own"
        )
    return found
