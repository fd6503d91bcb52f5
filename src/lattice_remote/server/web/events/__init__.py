"""``GET /projects/:slug/events/stream``: what is done in a project, as it happens, as server-sent events.

    telling     a change -> its events; where in them somebody stands. No I/O
    feed        all that listen to one project: each change is made into events once
    stream      one that listens: what it missed, then every change; how the connection begins and ends

A browser's page on this server listens with the cookie of its sign-in and nothing else::

    const source = new EventSource("/projects/web/events/stream");
    for (const kind of ["task_event", "task_snapshot", "resource_event", "text", "files"])
        source.addEventListener(kind, (e) => changed(kind, JSON.parse(e.data)));
    source.addEventListener("reset", () => location.reload());  // what was missed is not kept any more

When the connection is lost it asks again after a second, says with ``Last-Event-ID`` what it had last, and gets what
came after that: nothing twice, nothing left out. See docs/events.md for what is in each event.
"""
