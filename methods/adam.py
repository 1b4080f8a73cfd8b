"""Adam on one plain tensor: for objectives whose gradient is known, without a graph or an optimiser's bookkeeping.

Source: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1; the order of roundings is that of `torch.optim.Adam`.
"""

from __future__ import annotations

from methods.lazy import torch

_FIRST, _SECOND, _EPSILON = 0.9, 0.999, 1e-8  # beta_1, beta_2 and epsilon of the paper


class Adam:
    """Moments of the gradients of one tensor, and the step that they give.

    >>> x = torch.tensor([1.0, -2.0])
    >>> Adam(x, lr=0.1).step(2 * x)
    >>> x
    tensor([ 0.9000, -1.9000])
    """

    def __init__(self, x: torch.Tensor, lr: float) -> None:
        """Take the tensor, (*shape), that steps will change in place, and the learning rate."""
        self.x, self.lr, self.n_steps = x, lr, 0
        self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)
        self.scratch = torch.empty_like(x)

    def step(self, gradient: torch.Tensor) -> None:
        """Move against the gradient, (*shape), which is left as it is."""
        self.n_steps += 1
        self.mean.lerp_(gradient, 1 - _FIRST)
        self.square.mul_(_SECOND).addcmul_(gradient, gradient, value=1 - _SECOND)
        root = torch.sqrt(self.square, out=self.scratch)
        root.div_((1 - _SECOND**self.n_steps) ** 0.5).add_(_EPSILON)
        self.x.addcdiv_(self.mean, root, value=-self.lr / (1 - _FIRST**self.n_steps))
