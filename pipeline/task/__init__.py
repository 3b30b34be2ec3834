"""What ``pipeline task`` reads and writes."""
