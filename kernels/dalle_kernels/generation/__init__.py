"""What a step of generating takes on a GPU beside attention and matrix products.

A step has few numbers to compute, and each kernel's start counts: these do at once what torch does
in many. They are not differentiable. `runs_on` says where they run; elsewhere torch's are as good.
"""

from dalle_kernels.generation.api import add_norm, gumbel, runs_on

__all__ = ["add_norm", "gumbel", "runs_on"]
