"""Training: a flat loop that knows a task by a protocol."""
