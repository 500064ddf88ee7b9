"""What replace_, fuse_ and restore_ stand on: edits that can be undone, traces that can be trusted, the report."""
