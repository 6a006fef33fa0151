"""What happens to gradients between the backward pass and the optimizer.

transform.py    the order of the steps, and whether the optimizer step is skipped
piece.py        `Piece`, a named piece of a parameter; pieces of all ranks put together
resblocks.py    which resblock each parameter belongs to
batches.py      pieces that play the same part in all layers, as one batch
finite.py       which resblocks have a gradient that is not finite, agreed over all ranks
scaling.py      fp16: a gradient scale per resblock (paper 2.4)
node_mean.py    the mean between nodes, dense or by PowerSGD (paper 2.5)
dense.py        the mean of what is not compressed
all_reduce.py   the all-reduce of a mean, in a communication dtype: fp32, bf16, fp16 or 1-6-9
powersgd/       low-rank compression with error feedback (paper E)

Beside torch and torch.distributed only the gradient scales (`precision/`) and the 1-6-9 format
(`dalle_kernels`) are used here: nothing of DeepSpeed, of the config or of the model.
"""
