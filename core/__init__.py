"""The library under the nodes; never imports ComfyUI.

errors, registry    what everything else stands on
tensors, files      pure tensor functions; safetensors in and out, streaming
adapters            one file per algorithm: factors -> weight delta
archs               one entry per architecture: names, fused weights, aliases
keys                one file per key format; `resolve` matches a file with a model
bake                adapter into weights
merge               adapter files averaged, merged, extracted, resized, converted
quant               quantised weights: formats, reading, writing
train               datasets, the training loop, checkpoints
cli                 the file tools as a command
"""
