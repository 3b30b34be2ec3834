"""What the stages that write a cache are made of: settings, plan, rows from the model, units to disk."""
