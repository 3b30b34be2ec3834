"""A batch stream in, a transcoder out. Knows torch; knows no language model and no dataset."""

if __name__ != "tailrace.training":
    raise ImportError("import tailrace.training: this folder has no import name of its own")
