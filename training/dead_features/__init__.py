"""Features that have gone quiet: how they are counted, and what brings them back."""
