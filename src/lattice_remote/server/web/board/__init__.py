"""``/projects/:slug/dashboard/``: lattice's own dashboard, as if it ran beside whoever looks at it.

    page     the page, its files and its requests, answered by lattice's own handlers in the reader or the worker
    changes  the events that an open page listens to
    data     what the board shows first, in one request, for programs
    texts    plans and notes, for the editor in the page

Nothing of lattice's page is copied here: whatever version is installed is served, with paths made relative and a script
of ours (``livepage``) added on the way.
"""
