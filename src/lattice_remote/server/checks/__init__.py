"""Everything checked, and mended, while no server needs to run.

fsck            what is asked for, and the order of it
recovering      a worker that only opens a project
findings        what was found, and in which words
check_server, check_project, check_journal  what is looked at
"""
