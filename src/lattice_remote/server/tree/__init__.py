"""The replicated tree on disk: what a command changed, and its undo."""
