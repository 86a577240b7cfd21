"""ShadowKV for vLLM: a compressed, partly host-resident KV cache for long contexts."""

__version__ = "0.1.0"


def has_cuda() -> bool:
    """Tell whether the compiled extension contains the CUDA kernels."""
    # Imported here so that naming the version, as vLLM's plugin scan does, does not import torch.
    from vllm_shadowkv.extension import load

    return bool(load().has_cuda())
