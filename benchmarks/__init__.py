"""One script per claim about speed or memory; see README.md. Never run by the tests."""
