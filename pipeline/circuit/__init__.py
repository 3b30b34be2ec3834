"""What the stage ``pipeline circuit`` is made of."""
