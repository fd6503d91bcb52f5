"""The background agent: a process that follows caches, sends edits and answers commands."""
