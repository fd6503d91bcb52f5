"""What is said on the wire and what it means; no I/O, no clock, no task (see ``protocol/SPEC.md``).

paths        which files are shared, and the grammar of their names
operations   the six things a change does to a file, and how a tree applies them
messages     the frames
about        what a change is about, for those who only look on
codec        frames to bytes and back, bounded
replica      what a client does with each frame
effects      what it asks of the shell around it
comparison   the server's manifest while it is read, and the changes meanwhile
arriving     files of which not all pieces have come, and the changes to them meanwhile
memory_tree  a tree that is a dictionary, for vectors and tests
schema       all of it as JSON Schema, for protocol/schema.json
"""
