"""What is put on a `DeepAVFusion` encoder for a downstream task."""
