"""One decode step: operators, their reference, packed weights, CUDA graphs."""
