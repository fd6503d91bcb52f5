"""The RFC 7396 patch that leads from one JSON file to another, if there is one that is worth sending."""

import json
from typing import Any

from lattice_remote.protocol.operations import canonical_json, merge_patch

__all__ = ["patch_between"]


def patch_between(before: bytes, after: bytes) -> bytes | None:
    """Return a patch that turns the canonical JSON ``before`` into exactly the bytes ``after``, if it is a short one.

    None when either is not JSON, ``after`` is not in canonical form, or the patch is not under half its size.
    """
    try:
        old, new = json.loads(before), json.loads(after)
        if not isinstance(old, dict) or not isinstance(new, dict):
            return None
        patch = _difference(old, new)
        encoded = json.dumps(patch, separators=(",", ":")).encode()
        if len(encoded) * 2 >= len(after):
            return None
        # A patch can't set null, and Python takes 1 for true: what counts is that the bytes come out.
        return encoded if canonical_json(merge_patch(old, patch)) == after else None
    except (ValueError, RecursionError):
        return None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        if key in old and isinstance(value, dict) and isinstance(old[key], dict):
            if inner := _difference(old[key], value):
                patch[key] = inner
        elif key not in old or old[key] != value or type(old[key]) is not type(value):
            patch[key] = value
    return patch
