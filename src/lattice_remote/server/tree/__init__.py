"""Replicated tree on disk: changes of a command, and their undo."""
