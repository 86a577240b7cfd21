"""What runs in a worker: it plans steps, seals blocks, and computes a layer's forward pass."""
