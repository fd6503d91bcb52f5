"""A project's files: what a command touches, and what that makes of them.

audit_events  what Python reports, and which of it is watched
capture       what a command touches, in order, and what it must not
undo          pre-images, so that a command is all or nothing
tree          the files as they were, and the operations that lead to what they are
jsondiff      the patch between two JSON files
manifest      the list of all files, on disk
"""
