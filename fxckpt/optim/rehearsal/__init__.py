"""Optimizers that are not of ``torch.optim``: their own step, rehearsed on stand-ins, is split where that changes nothing."""
