"""The demonstration: every stage on a small real model and its text."""
