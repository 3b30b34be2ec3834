"""The language model: loading it, its tokenizer, and the activations at chosen hooks."""
