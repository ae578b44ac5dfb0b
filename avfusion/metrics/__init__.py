"""What downstream tasks are scored by: recognition, retrieval, localisation, separation, segmentation."""
