"""A step, from gradients to launches: planned, then placed, prepared and run."""
