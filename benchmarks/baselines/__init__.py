"""What we compare with: as it is published or as its users write it, and the same algorithm in plain PyTorch."""
