"""What runs in the scheduler's process: who may free, keep and share which page. It knows nothing of the workers."""
