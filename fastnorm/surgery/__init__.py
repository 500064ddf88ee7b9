"""What replace_, fuse_ and restore_ stand on: undoable edits, traces to trust, the report."""
