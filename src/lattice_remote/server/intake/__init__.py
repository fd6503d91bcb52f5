"""A whole project taken in, from files that may be anybody's: put together apart, checked, and only then put in place.

report      what a project holds, and what was done to it
candidate   the directory that it is put together in, which nobody is shown
sources     where the files come from: a pack, or a directory
check       the process that does it, under the audit hook: nobody trusts what it reads
quarantine  that process, started and listened to

Putting a checked project in the place of an empty one is the worker's: ``worker/adoption.py``.
"""
