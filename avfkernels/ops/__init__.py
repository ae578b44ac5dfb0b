"""The ops: one place each; mathematics, reference, eager form, kernels, registration, from top to bottom."""
