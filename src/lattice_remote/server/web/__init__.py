"""What speaks HTTP: programs (REST), streams of events, and the dashboard for browsers. One request, one way in.

    app        which path is served by what; past the door, and with bounded bodies
    gate       who asks, and for which project: each handler's first line
    cookie     what a browser that is signed in brings in place of a token
    origin     whether a page of ours asks, or one of another site (CSRF)
    headers    what every answer tells browsers
    pages/     the pages of our own: signing in and out, the list of projects, what went wrong
    policy     what lattice's own dashboard page may do in a browser
    asking     a write: asked of the project's worker like a command of a client, and its answer
    keys       a request that is sent again runs once
    staying    work that ends when its client leaves
    rest       programs: tasks, resources, plans and notes
    answers    what is said in JSON, and with which status
    events/    what is done in a project, as it happens
    streaming  an answer that goes on: a stream of events
    listing    the projects that somebody may see
    health     how the server is

Nothing here touches the project's files. Writes go to its worker (``asking``), reads to its reader
(``Project.reader``), and both run lattice's own code.
"""
