"""One decode step: the key/value cache, the native step, and the operators in plain PyTorch."""
