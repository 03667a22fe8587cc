"""Layers that Graph WaveNet and STGCN share. Hidden features are [N, B, T, C]:
with nodes first a product with a graph is one
of [N, N] with [N, B·T·C], and with channels last a convolution over time is a linear layer."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class TemporalConvolution(nn.Module):
    """Convolution over time without padding: the output at a frame is made of ``kernel`` inputs, itself the last of
    them, ``dilation`` frames apart. T becomes T − (kernel − 1)·dilation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.kernel, self.dilation = kernel, dilation
        self.linear = nn.Linear(kernel * inputs, outputs)

    def forward(self, x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B t D"]:
        frames = x.shape[2] - (self.kernel - 1) * self.dilation
        return self.linear(
            torch.cat([x[:, :, i * self.dilation : i * self.dilation + frames] for i in range(self.kernel)], -1)
        )


def propagate(graph: Float[Tensor, "N N"], x: Float[Tensor, "N B T C"]) -> Float[Tensor, "N B T C"]:
    """Row n: the sum over nodes m of graph[n, m]·x[m]; ``graph`` is sparse or dense."""
    return (graph @ x.reshape(len(x), -1)).view(x.shape)
