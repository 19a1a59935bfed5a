"""Adapter Lab: load, train, average, merge and quantise with LoRA-family adapters in ComfyUI."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI; nothing of the pack or of ComfyUI is imported before."""
    from .nodes import AdapterLabExtension

    return AdapterLabExtension()
