"""REST: programs read and write a project in JSON, in the envelopes of ``lattice --json``.

    tasks, activity, resources, texts    the endpoints, each with what it takes and what it answers
    endpoint     one endpoint as a value: it is routed and described (``openapi``) from the same
    table        all of them
    elsewhere    what is described with them, and served by others
    asked        a request, checked: its query, its body, and the id under which it runs once
    commands     lattice's commands, as which reads and writes are carried out; with which status they are answered
    paging       a part of a list, and where the next one begins
    shapes       what lattice prints, as far as it can be promised

Nothing of lattice is done here a second time: a write is a command line, a read is what a command prints.
"""
