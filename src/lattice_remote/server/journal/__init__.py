"""The numbered changes and replies on disk.

segments        one file of them, and how much of it can be read
journal         all of them, as their writer sees them
journal_reader  the same, as others read it
contents        what they tell of the content of files
repair          what a power cut took
copied          what a copy of a live directory lacks
"""
