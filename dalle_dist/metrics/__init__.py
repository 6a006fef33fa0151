"""Measures of a model, each usable while training and afterwards.

reconstruction.py   PSNR of the image tokenizer, share of its codes in use
held_out.py         cross-entropies per token on pairs that were not trained on
caption_gain.py     what the right caption is worth in image loss
registry.py         measures by name, for the config's `train.metrics`
"""
