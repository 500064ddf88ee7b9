"""Everything between a tensor and a kernel, one folder per family."""
