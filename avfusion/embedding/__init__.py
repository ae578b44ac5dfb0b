"""Clips to features, and features on disk."""
