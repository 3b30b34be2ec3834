"""What ``pipeline analyze`` is made of: where rows come from, and the pass over them by several processes."""
