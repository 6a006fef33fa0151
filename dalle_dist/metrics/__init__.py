"""Measures of a model, each usable while training and afterwards.

reconstruction.py   PSNR and SSIM of the image tokenizer
codes.py            its codes in use, and their entropy
held_out.py         cross-entropies per token on pairs that were not trained on
caption_gain.py     what the right caption is worth in image loss
identification.py   whether a generated image is nearest to the true one of its caption
registry.py         measures by name, for the config's `train.metrics`
"""
