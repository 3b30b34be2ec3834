"""Circuits: the exact parts of a quantity inside a language model on a prompt, and the features they come through.

Everything here is linear algebra on one recorded forward pass (``record``): attention patterns and the scales of norms
are held fixed, MLPs are replaced by transcoder features plus whatever the transcoder misses, and what is left is a sum
that adds up. ``docs/guides/circuits.md`` has the formulas.
"""
