"""``python -m tailrace``: the same as the command ``pipeline``."""

from tailrace.pipeline.cli import main

if __name__ == "__main__":
    main()
