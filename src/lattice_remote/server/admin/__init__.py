"""What an administrator does with whole projects, whether a server runs or not.

commands   lattice-remote import, export, project rename, archive, unarchive, delete
importing  a directory becomes a project
exporting  a project becomes a directory, as it was at one moment
moving     renamed, archived and deleted projects

A running server is asked to let go of the project first, see ``data/closing.py``.
"""
