"""What `make demo` shows: the needle model, then a real decoder, each with both backends."""
