"""A batch stream in, a transcoder out. Knows torch; knows no language model and no dataset."""
