"""Analysis of features from weights alone: no text is run, so nothing depends on an input."""
