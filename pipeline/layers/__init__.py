"""What ``pipeline circuits-model`` is made of: what it costs beforehand, and how good each layer became."""
