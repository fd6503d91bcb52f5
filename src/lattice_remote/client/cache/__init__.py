"""The directory as a tree that follows the server's.

follower    drives a replica (``protocol/replica.py``) against a cache
performing  what the replica says, done to the files: nothing that somebody writes is lost
cache       atomic writes, and what is known of each file
directory   how files are reached, never through a link
state       which point of the history the directory holds
known       what each file was when one of ours last wrote it
survey      looks at every file, for what others have changed
comparing   files against the server's manifest
healing     which file is put right when, and which is fought over
keepsakes   which contents are rescued before a file is restored
rescued     the rescued files
edits       plans and notes that people edit in place
older       on which text an edit was made, where the editor had opened it before a change came
busy        whether somebody has a file open for writing
conflicts   edits that could not be merged, set aside until somebody resolves them
"""
