"""Attention and the loss: their definitions, and fast paths that mean the same."""

import torch


def refuse_second_derivatives():
    """To be called by a backward pass that autograd cannot see into: it would take what comes out
    for a constant, and its derivative for 0.
    """
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("no second derivatives: use kernels='reference'")
