"""The state of a copy in words, each with its evidence: what ``show`` and ``status`` print."""

from typing import Any

from lattice_remote.client.commands.shared import count
from lattice_remote.client.freshness import describe_age

__all__ = ["acting", "agent", "conflicts", "connection", "copy", "edits", "healed", "rescued", "versions"]

_MIB = 1024 * 1024


def connection(answer: dict[str, Any]) -> str:
    heard = answer["last_heard_s"]
    if answer["connected"]:
        return f"connected (last frame {heard} s ago)"
    ago = "nothing heard of the server yet" if heard is None else f"last frame {describe_age(heard)} ago"
    return f"not connected: {answer['error'] or 'connecting'} ({ago})"


def copy(answer: dict[str, Any]) -> str:
    here, there = answer["seq"], answer["server_seq"]
    if answer["trouble"]:
        return f"stuck at change {here}: {answer['trouble']}"
    if answer["current"]:
        return f"current (change {here} here, {there} on the server)"
    if there is None:
        age = "never filled" if answer["age_s"] is None else f"{describe_age(answer['age_s'])} old"
        return f"{age} (change {here} here, unknown on the server)"
    return f"catching up (change {here} here, {there} on the server, {count(answer['wanted'], 'file')} to fetch)"


def healed(healed: dict[str, Any]) -> str:
    """Say what other hands than the server's did to the files, and how that is noticed."""
    text = f"{count(healed['count'], 'file')} since the agent started"
    if healed["last_path"] is not None:
        text += f", last {healed['last_path']} {describe_age(healed['last_age_s'])} ago"
    if healed["fought_over"]:
        text += f"; another process keeps writing {', '.join(healed['fought_over'][:5])}"
    return f"{text} ({healed['watched'] or 'nobody watches: no agent'})"


def edits(answer: dict[str, Any]) -> str:
    """Say how many plans and notes were edited here and not sent yet, which, and what they wait for."""
    refused, waits_for, withheld = answer["refused_edits"], answer["edits_wait_for"], answer["withheld_edits"]
    unsent = answer["unsent_edits"]
    how = "sent as soon as they are saved" if waits_for is None else f"they wait for {waits_for}"
    if not unsent:
        return f"none ({how})"
    shown = [f"{path} (not taken as it is: {refused[path]})" if path in refused else path for path in unsent]
    shown = [f"{path} (waits for you: {withheld[path]})" if path in withheld else path for path in shown]
    return f"{len(unsent)}: {', '.join(shown)} ({how})"


def conflicts(conflicts: list[dict[str, Any]]) -> str:
    """Say which texts wait for somebody to say what is to be kept."""
    if not conflicts:
        return "none"
    named = ", ".join(f"{each['what']} of {each['short_id']}" for each in conflicts)
    return f"{len(conflicts)}: {named}; see: lattice remote resolve"


def rescued(entries: list[dict[str, Any]]) -> str:
    """Say how many files were rescued and wait for the user."""
    if not entries:
        return "none"
    files = sum(len(entry["files"]) for entry in entries)
    return f"{count(files, 'file')} in {count(len(entries), 'entry', 'entries')}; see: lattice remote rescued"


def agent(agent: dict[str, Any] | None) -> str:
    if agent is None:
        return "not used"
    return str(agent.get("error") or f"pid {agent['pid']}, {count(len(agent['caches']), 'copy', 'copies')}")


def acting(answer: dict[str, Any]) -> str:
    if answer["actor"] is None:
        if answer["has_token"]:
            return f"unknown: {answer['actor_error'] or 'not connected'}"
        return "nobody: no token; log in with: lattice remote login"
    return ", ".join([answer["actor"], *answer["act_as"]])


def versions(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(found.items()))


def payloads(found: dict[str, Any]) -> str:
    """Say which large contents of artifacts are not here, and what becomes of them."""
    how = "fetched in the background" if found["mode"] == "background" else "fetched on demand"
    if not found["away"]:
        return f"all here ({how})"
    text = f"{count(found['away'], 'file')} of {found['away_bytes'] / _MIB:.1f} MiB not here ({how})"
    if (now := found["fetching"]) is not None:
        text += f"; fetching {now['path']}, {now['done'] / _MIB:.1f} of {now['total'] / _MIB:.1f} MiB"
    return text + (f"; {found['trouble']}" if found["trouble"] else "")
