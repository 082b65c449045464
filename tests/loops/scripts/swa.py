"""After torch.optim.swa_utils' tutorial: an average of the weights from an epoch on, SWALR, BatchNorm updated at the end."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import fxckpt  # fxckpt

EPOCHS, SWA_START = 7, 1

torch.manual_seed(0)
g = torch.Generator().manual_seed(1)
x = torch.randn(50, 6, generator=g)
loader = DataLoader(TensorDataset(x, x.prod(1, keepdim=True).tanh()), batch_size=8, shuffle=True)
model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
swa_model = AveragedModel(model)
scheduler = CosineAnnealingLR(optimizer, T_max=100)
swa_scheduler = SWALR(optimizer, anneal_epochs=5, swa_lr=0.05)
extra = {"scheduler": scheduler, "swa": swa_scheduler}  # fxckpt
fxckpt.compile_step(optimizer, "ckpt", model=[model, swa_model], every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
for epoch in fxckpt.epochs(EPOCHS):  # fxckpt, was: for epoch in range(EPOCHS):
    for inputs, target in fxckpt.batches(loader):  # fxckpt, was: for inputs, target in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), target)
        loss.backward()
        optimizer.step()
    if epoch > SWA_START:
        swa_model.update_parameters(model)
        swa_scheduler.step()
    else:
        scheduler.step()
update_bn(loader, swa_model)
print(f"END loss {loss.item():.6f} lr {optimizer.param_groups[0]['lr']}")
finish(model, swa_model, optimizer, scheduler, swa_scheduler)
