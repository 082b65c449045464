"""After Pytorch-UNet: autocast, a GradScaler, clipping, and validation in the middle of an epoch for ReduceLROnPlateau."""

from __future__ import annotations

import torch
from script_prelude import finish
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import fxckpt  # fxckpt


def double_conv(inside: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
        nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inc, self.down, self.up = double_conv(1, 4), double_conv(4, 8), nn.ConvTranspose2d(8, 4, 2, 2)
        self.conv, self.outc = double_conv(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down(F.max_pool2d(x1, 2))
        return self.outc(self.conv(torch.cat([x1, self.up(x2)], dim=1)))


def dice_loss(logits, masks):
    probs, truth = F.softmax(logits, dim=1).float(), F.one_hot(masks, 2).permute(0, 3, 1, 2).float()
    inter, sums = 2 * (probs * truth).sum(dim=(2, 3)), (probs + truth).sum(dim=(2, 3))
    return 1 - ((inter + 1e-6) / (sums + 1e-6)).mean()


@torch.inference_mode()
def evaluate(net, dataloader):
    net.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = sum(1 - dice_loss(net(images), masks).item() for images, masks in dataloader)
    net.train()
    return score / len(dataloader)


torch.manual_seed(0)
g = torch.Generator().manual_seed(1)
masks = (F.avg_pool2d(torch.randn(40, 1, 8, 8, generator=g), 3, 1, 1) > 0).squeeze(1).long()
images = masks.unsqueeze(1) + 0.4 * torch.randn(40, 1, 8, 8, generator=g)
train_set, val_set = random_split(TensorDataset(images, masks), [32, 8], generator=torch.Generator().manual_seed(0))
train_loader = DataLoader(train_set, shuffle=True, batch_size=4)
val_loader = DataLoader(val_set, shuffle=False, drop_last=True, batch_size=4)
model = UNet().to(memory_format=torch.channels_last)
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, weight_decay=1e-8, momentum=0.9, foreach=True)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=1)
grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=9)
criterion = nn.CrossEntropyLoss()
global_step = 0
extra = {"scheduler": scheduler, "scaler": grad_scaler}  # fxckpt
fxckpt.compile_step(optimizer, "ckpt", model=model, every=1, extra=extra)  # fxckpt
global_step = fxckpt.load().iteration  # fxckpt
for _epoch in fxckpt.epochs(4):  # fxckpt, was: for _epoch in range(4):
    model.train()
    for images, true_masks in fxckpt.batches(train_loader):  # fxckpt, was: for images, true_masks in train_loader:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            masks_pred = model(images.to(memory_format=torch.channels_last))
            loss = criterion(masks_pred, true_masks) + dice_loss(masks_pred, true_masks)
        optimizer.zero_grad(set_to_none=True)
        grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grad_scaler.step(optimizer)
        grad_scaler.update()
        global_step += 1
        if global_step % 3 == 0:
            val_score = evaluate(model, val_loader)
            scheduler.step(val_score)
print(f"END loss {loss.item():.6f} dice {val_score:.6f} lr {optimizer.param_groups[0]['lr']} scale {grad_scaler.get_scale()}")
finish(model, optimizer, scheduler, grad_scaler, global_step)
