"""The language model with transcoders in place of its MLPs, and plots of L0 against what that costs."""
