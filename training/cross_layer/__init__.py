"""Cross-layer transcoders: features that read one layer and write to it and to every later one."""
