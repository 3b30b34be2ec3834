"""A language model with something else in place of what chosen sites compute."""
