"""What ``pipeline query`` is made of."""
