"""The engine that trains a model on many ranks.

interface.py   what the training loop asks of an engine
deepspeed/     the engine by DeepSpeed; the only folder that imports it or knows its private names
"""
