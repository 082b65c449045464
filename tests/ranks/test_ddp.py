"""``torch.compile(DistributedDataParallel(m))`` is traced as ``DistributedDataParallel(torch.compile(m))`` is, with its bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxckpt
from fxckpt.graph.model.book import traces
from fxckpt.graph.model.layers import gradient_order

pytestmark = pytest.mark.usefixtures("one_thread", "one_rank")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Large enough for several buckets of a MiB."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(300, 300) for _ in range(5))

    def forward(self, x):
        for layer in self.inner:
            x = torch.relu(layer(x))
        return x


def ours(gm, inputs):
    """Our backend with a quick compiler inside: DDP's splits are the same whatever compiles them."""
    return fxckpt.backend(gm, inputs, options={"inner": "aot_eager"})


def train(how, root, backend, inside=Net):
    """Four steps; the losses, the parameters, the optimizer and the model as it was compiled."""
    torch.manual_seed(0)
    plain = inside()
    if how == "compiled outside":
        model = torch.compile(DistributedDataParallel(plain, bucket_cap_mb=1), backend=backend)
    else:
        model = DistributedDataParallel(torch.compile(plain, backend=backend), bucket_cap_mb=1)
    opt = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    if root is not None:
        fxckpt.compile_step(opt, root, model=model, every=1, update="native")
    losses = []
    for step in range(4):
        loss = model(torch.full((2, 300), float(step + 1))).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item().hex())
    return losses, [p.detach().clone() for p in plain.parameters()], opt, plain


@pytest.mark.parametrize("how", ["compiled outside", "compiled inside"])
def test_ddp_is_traced_and_has_the_bits_that_it_has_without_us(how, root, caplog):
    expected, params, _, _ = train(how, None, "aot_eager")
    torch._dynamo.reset()
    losses, found, opt, plain = train(how, root, ours)
    assert losses == expected and all(map(torch.equal, found, params))
    assert "compiles nothing" not in caplog.text
    places = gradient_order(list(plain.named_parameters()), traces)
    assert list(places) == list(reversed(dict(plain.named_parameters())))
    assert all(each.region is not None for each in places.values())
    opt.ckpt.shutdown()


@pytest.mark.parametrize("how", ["compiled outside", "compiled inside"])
def test_where_torch_compiles_nothing_of_a_ddp_it_is_said(how, root, caplog):
    *_, opt, plain = train(how, root, ours, lambda: nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)))
    opt.ckpt.shutdown()
    places = gradient_order(list(plain.named_parameters()), traces)
    seen = all(each.region is not None for each in places.values())
    assert ("compiles nothing" in caplog.text) is not seen
    assert seen is (how == "compiled inside")  # if torch does better one day, the warning goes
