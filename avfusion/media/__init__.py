"""Files in, inputs of a model out."""
