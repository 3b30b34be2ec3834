"""``pipeline doctor``: what this machine has, how fast it is, and what will limit training on it."""
