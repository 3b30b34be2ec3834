"""Training rows straight from the language model, mixed in memory: for users without disk (``docs/guides/live.md``)."""
