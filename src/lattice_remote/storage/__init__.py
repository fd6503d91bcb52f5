"""A board for programs: the same calls on a local project and on a remote one (DESIGN section 6).

backend         ``StorageBackend``, what both can do
values          what comes of a write
events          the shape of an event, its bounds, and in whose name it is
task_rules      what an event of a task may say, by lattice's own core
resource_rules  the same of a resource
local           ``LocalStorage``: lattice's own files, under lattice's own locks

``LocalStorage`` is also what the server does with the writes of a ``RemoteStorage`` (``client/storage.py``).
"""
