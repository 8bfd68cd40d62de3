"""Strong and weak scaling of data-parallel EP: measured under torchrun, and predicted for more processes and nodes."""
