"""Models: the encoder, the masked auto-encoder, heads, checkpoints."""
