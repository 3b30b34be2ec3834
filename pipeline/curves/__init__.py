"""``pipeline curves``."""
