"""State of the algorithm: how blocks are sealed and kept. Nothing here knows vLLM."""
