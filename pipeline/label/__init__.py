"""What ``pipeline label`` is made of."""
