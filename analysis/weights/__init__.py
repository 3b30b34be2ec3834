"""What a transcoder's features mean from weights alone: no text is run, so nothing here depends on an input."""
