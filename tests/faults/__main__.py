"""``python -m tests.faults --seconds 3600`` runs the laboratory; ``--help`` says the rest."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # processes under test import this module too, and need nothing of what follows
    from tests.faults.run import main

    sys.exit(main(sys.argv[1:]))
