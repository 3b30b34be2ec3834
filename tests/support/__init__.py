"""What tests share: builders of small models, caches and artifacts, and where the repository lies."""
