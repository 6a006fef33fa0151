"""Measures of finished images against a reference set, of any model: the pieces of an evaluation.

prepare.py          crop and resize, the same for reference and generated images
blur.py             the Gaussian blur under which the paper compares models
features.py         feature networks by one protocol: Inception, or a CLIP's image encoder
inception.py        the Inception network of FID, from a TorchScript file
moments.py          mean and covariance of features, over batches and ranks
frechet.py          Fréchet distance: FID where the features are Inception's
reference.py        moments on disk with the setting that they belong to
inception_score.py  inception score over splits
lpips.py            LPIPS, from a TorchScript file
rerank.py           what choosing the best of N candidates gives, for N = 1, 2, 4 ...
overlap.py          nearest neighbours of one set in another, chunk by chunk
self_checks.py      distances whose right answer is known, to be printed beside a figure
"""
