"""The only package of this project that imports vLLM."""
