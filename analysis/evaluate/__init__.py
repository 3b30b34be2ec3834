"""What a language model loses with transcoders in place of its MLPs."""
