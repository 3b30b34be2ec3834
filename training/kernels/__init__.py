"""Ways to compute one training step: dense autograd as the reference, and the sparse step that agrees with it."""
