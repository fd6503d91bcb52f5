"""The wire protocol: frames, operations, and the replica that applies them. No I/O.

Start with ``messages`` (the frames) and ``operations`` (changes of files); ``replica`` is the client's state machine.
"""
