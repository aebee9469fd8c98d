"""How every process reads its settings: one TOML, one table per package, unknown keys refused.

Order: the class's defaults < TOML < ``TIEBREAK_<TABLE>_<FIELD>`` in the
environment. Secrets come from files or the environment only. Read at entry points; constructors get values.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

Config = TypeVar("Config", bound=msgspec.Struct)


class InvalidConfiguration(ValueError):
    """The configuration cannot be used; the message names table, key and the mend."""


def read_table(path: Path, table: str, cls: type[Config], environ: Mapping[str, str] | None = None) -> Config:
    """The ``[table]`` of the TOML at ``path`` as ``cls``, with environment overrides applied.

    Raises InvalidConfiguration for an unreadable file, an unknown key or a wrong type.
    """
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfiguration(f"{path}: {error}") from error
    return convert_table(document.get(table, {}), table, cls, environ, where=str(path))


def convert_table(
    values: Mapping[str, Any],
    table: str,
    cls: type[Config],
    environ: Mapping[str, str] | None = None,
    *,
    where: str = "configuration",
) -> Config:
    """``values`` as ``cls``; ``TIEBREAK_<TABLE>_<FIELD>`` wins over them."""
    environ = os.environ if environ is None else environ
    merged: dict[str, Any] = dict(values)
    for field in msgspec.structs.fields(cls):
        override = environ.get(f"TIEBREAK_{table}_{field.name}".upper())
        if override is not None:
            merged[field.name] = override
    try:
        return msgspec.convert(merged, cls, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidConfiguration(f"{where}: [{table}]: {error}") from error
