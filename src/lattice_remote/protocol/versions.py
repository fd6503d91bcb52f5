"""Which of two versions is the older one: what to tell a person whose two sides differ."""

import re

__all__ = ["describe_difference"]


def describe_difference(here: str, there: str, *, here_is: str, there_is: str) -> str | None:
    """Return what to do about two versions of one program; None when they are the same.

    Args:
        here: one version, as ``0.2.1``.
        there: the other.
        here_is: what has the one, as ``this machine``.
        there_is: what has the other.
    """
    if here == there:
        return None
    ours, theirs = _numbers(here), _numbers(there)
    if ours == theirs:
        return f"{here} and {there} differ"
    return f"{here if ours < theirs else there} is older: upgrade {here_is if ours < theirs else there_is}"


def _numbers(version: str) -> list[int]:
    """Return the leading numbers, of bounded size: the text may come from a peer."""
    found = re.match(r"\d{1,9}(?:\.\d{1,9}){0,7}", version)
    return [int(number) for number in found[0].split(".")] if found else []
