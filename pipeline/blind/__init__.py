"""Blind comparisons and blind case studies: what a rater sees, and what is kept from them until they have judged."""
