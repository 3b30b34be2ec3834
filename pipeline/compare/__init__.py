"""What ``pipeline compare`` is made of."""
