"""One module per command of the command line; each holds ``command`` and calls one stage function."""
