"""Before something is read: the cache is brought up to date, or it is said how old it is. Standard library only."""

from collections.abc import Callable

from lattice_remote.client.agent_client import Progress, ask, request
from lattice_remote.client.settings import detachment
from lattice_remote.errors import RemoteError, one_line

__all__ = ["describe_age", "ensure_current"]


def ensure_current(directory: str, say: Callable[[str], object], on_progress: Progress | None = None) -> None:
    """Bring the cache up to date if the server is in reach; else say, in one line, how old it is.

    ``say`` gets each line that the user should read, which is none most of the time.

    Raises:
        RemoteError: the cache was never filled, so there is nothing to show.
    """
    if (why := detachment(directory)) is not None:
        say(f"lattice-remote: {one_line(why)}")
        return
    answer = ask(request("ready", directory), on_progress)
    for notice in answer["notices"]:
        say(f"lattice-remote: {one_line(notice)}")
    if answer["current"]:
        return
    if not answer["filled"]:
        raise RemoteError(answer["message"], code=answer["code"])
    age = "data of unknown age" if answer["age_s"] is None else f"data from {describe_age(answer['age_s'])} ago"
    say(f"lattice-remote: {one_line(answer['message'])}; showing {age} (change {answer['seq']})")


def describe_age(age_s: float) -> str:
    """Return an age in its largest fitting unit: ``8 s``, ``3 min``, ``5 h``, ``2 days``."""
    if age_s < 120:
        return f"{age_s:.0f} s"
    if age_s < 7200:
        return f"{age_s / 60:.0f} min"
    if age_s < 172800:
        return f"{age_s / 3600:.0f} h"
    return f"{age_s / 86400:.0f} days"
