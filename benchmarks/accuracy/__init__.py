"""How much accuracy ShadowKV costs: paired scores, the paper's method, studies of the method's parts, RULER."""
