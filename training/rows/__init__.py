"""Rows as tensors: batches of a cache, samples of it, one scale for every model, and which rows are ordinary."""
