"""DALLE-pytorch (lucidrains/DALLE-pytorch): `dalle.pt` and `vae.pt`, read and written."""
