"""Wire protocol: frames, file operations, and the replica that applies them. No I/O.

Start with ``messages`` (frames) and ``operations`` (changes of files); ``replica`` is the client's state machine.
"""
