"""The sparse step on a GPU: Triton kernels, the operators around them, and the proof that they are right and faster."""
