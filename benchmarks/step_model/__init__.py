"""A decode step of Llama-3.1-8B on a GPU, predicted: `python -m benchmarks.step_model --machine H100`.

Nothing here is measured. An op takes what its slowest part takes (bytes over a bandwidth, instructions over the rate at
which they are issued, or what it waits for), each of which is an assumption with a name (`assumed.py`). `model.py` adds
them up, `tables.py` shows them; the tables of docs/gpu_predictions.md are what this prints.
"""
