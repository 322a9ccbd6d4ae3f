"""Meeting other software where it is: models that keep their queries and keys, PyTorch's process groups."""
