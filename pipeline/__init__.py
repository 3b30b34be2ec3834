"""From text to artifacts: the staged jobs and the command line. The only package that opens texts and models."""

if __name__ != "tailrace.pipeline":
    raise ImportError("import tailrace.pipeline, or run python -m tailrace: this folder has no import name of its own")
