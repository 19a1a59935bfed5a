"""The library under the nodes; never imports ComfyUI.

errors, registry    what everything else stands on
tensors, files      pure tensor functions; safetensors in and out, streaming
adapters            one file per algorithm: factors -> weight delta
archs               one entry per architecture: names, fused weights, aliases
keys                one file per key format; `resolve` matches a file with a model
bake                adapter into weights
train               datasets, the training loop, checkpoints
"""
