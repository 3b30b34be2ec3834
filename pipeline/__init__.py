"""From text to artifacts: the staged jobs and the command line. The only package that opens texts and models."""
