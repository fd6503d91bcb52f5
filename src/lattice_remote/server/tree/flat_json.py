"""Fast JSON of flat objects, above all of ``ids.json``, which every ``create`` rewrites and every short id needs.

All results equal those of ``json``.
"""

import json
from typing import Any

import msgspec

from lattice_remote.protocol.operations import FlatObject, flat_json

__all__ = ["FlatJson", "flat_value"]

_MIN_BYTES = 4096
_MAX_BYTES = 2 * 1024 * 1024
_MAX_RECENT = 2
_decoder = msgspec.json.Decoder(FlatObject)
_recent: list[tuple[bytes, FlatObject]] = []
"""The last contents with their values, the newest last."""


def flat_value(data: bytes) -> FlatObject | None:
    """Return the value of a flat object in canonical form, None for any other content. It must not be changed."""
    for known, value in _recent:
        if known == data:
            return value
    try:
        value = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError):
        return None
    if flat_json(value) != data:
        return None
    _remember(data, value)
    return value


def _remember(data: bytes, value: FlatObject) -> None:
    if _MIN_BYTES <= len(data) <= _MAX_BYTES:
        _recent.append((data, value))
        del _recent[:-_MAX_RECENT]


def _copied(value: FlatObject) -> FlatObject:
    return {key: dict(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}


class FlatJson:
    """Replacement of ``json`` in lattice's index of short ids."""

    def loads(self, text: str) -> Any:
        value = flat_value(text.encode()) if len(text) >= _MIN_BYTES and text.isascii() else None
        return _copied(value) if value is not None else json.loads(text)

    def dumps(self, value: Any, **options: Any) -> str:
        data = flat_json(value) if options == {"sort_keys": True, "indent": 2} else None
        if data is None:
            return json.dumps(value, **options)
        _remember(data, _copied(value))
        return data[:-1].decode()

    def __getattr__(self, name: str) -> Any:
        return getattr(json, name)
