"""What ``pipeline score`` prints and draws."""
