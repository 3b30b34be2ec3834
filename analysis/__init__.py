"""What a transcoder means: feature tables, evaluation, dashboards and circuits. Loads no language model."""

if __name__ != "tailrace.analysis":
    raise ImportError("import tailrace.analysis: this folder has no import name of its own")
