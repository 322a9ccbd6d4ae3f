"""Meeting other software where it is: PyTorch's process groups."""
