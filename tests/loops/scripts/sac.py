"""After CleanRL's SAC: one loop over steps of the environment, three optimizers, delayed updates of actor and targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from script_prelude import finish
from tiny_gym import Pendulum
from torch import nn
from torch.nn import functional as F

import fxckpt  # fxckpt

TOTAL, LEARNING_STARTS, BATCH, GAMMA, TAU, POLICY_FREQUENCY = 60, 12, 16, 0.99, 0.05, 2


class SoftQNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 24), nn.Linear(24, 1)

    def forward(self, x, a):
        return self.fc2(F.relu(self.fc1(torch.cat([x, a], 1))))


class Actor(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc_mean, self.fc_logstd = nn.Linear(3, 24), nn.Linear(24, 1), nn.Linear(24, 1)
        self.register_buffer("action_scale", torch.tensor([2.0]))

    def get_action(self, x):
        x = F.relu(self.fc1(x))
        normal = torch.distributions.Normal(self.fc_mean(x), (-2 + 1.5 * torch.tanh(self.fc_logstd(x))).exp())
        x_t = normal.rsample()
        y_t = torch.tanh(x_t)
        log_prob = normal.log_prob(x_t) - torch.log(self.action_scale * (1 - y_t.pow(2)) + 1e-6)
        return y_t * self.action_scale, log_prob.sum(1, keepdim=True)


@dataclass
class ReplayBuffer:
    rows: torch.Tensor  # observation, next observation, action, reward, done
    pos: int = 0
    full: bool = False

    def add(self, *parts):
        self.rows[self.pos] = torch.from_numpy(np.concatenate([np.atleast_1d(part) for part in parts]).astype(np.float32))
        self.pos += 1
        if self.pos == len(self.rows):
            self.pos, self.full = 0, True

    def sample(self):
        chosen = self.rows[np.random.randint(0, len(self.rows) if self.full else self.pos, BATCH)]
        return chosen.split([3, 3, 1, 1, 1], dim=1)


np.random.seed(1)
torch.manual_seed(1)
env, rb = Pendulum(), ReplayBuffer(torch.zeros(40, 9))
actor = Actor()
qf1, qf2, qf1_target, qf2_target = (SoftQNetwork() for _ in range(4))
qf1_target.load_state_dict(qf1.state_dict())
qf2_target.load_state_dict(qf2.state_dict())
q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=3e-3)
actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
log_alpha = nn.Parameter(torch.zeros(1))
a_optimizer = torch.optim.Adam([log_alpha], lr=3e-3)
nets = [actor, qf1, qf2, qf1_target, qf2_target, nn.ParameterList([log_alpha])]  # fxckpt
obs = env.reset()
extra = {"env": vars(env), "rb": rb}  # fxckpt
optimizers = [q_optimizer, actor_optimizer, a_optimizer]
fxckpt.compile_step(optimizers, "ckpt", model=nets, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
obs = env.seen()  # fxckpt
alpha = log_alpha.exp().item()
for global_step in fxckpt.steps(TOTAL):  # fxckpt, was: for global_step in range(TOTAL):
    if global_step < LEARNING_STARTS:
        action = np.random.uniform(-2, 2, 1)
    else:
        action = actor.get_action(torch.from_numpy(obs).unsqueeze(0))[0].detach().numpy()[0]
    next_obs, reward, done = env.step(float(action[0]))
    rb.add(obs, next_obs, action, reward, done)
    obs = env.reset() if done else next_obs
    if global_step > LEARNING_STARTS:
        x, x_next, a, r, d = rb.sample()
        with torch.no_grad():
            next_a, next_log_pi = actor.get_action(x_next)
            min_next = torch.min(qf1_target(x_next, next_a), qf2_target(x_next, next_a)) - alpha * next_log_pi
            target = r + (1 - d) * GAMMA * min_next
        qf_loss = F.mse_loss(qf1(x, a), target) + F.mse_loss(qf2(x, a), target)
        q_optimizer.zero_grad()
        qf_loss.backward()
        q_optimizer.step()
        if global_step % POLICY_FREQUENCY == 0:
            for _ in range(POLICY_FREQUENCY):
                pi, log_pi = actor.get_action(x)
                actor_loss = (alpha * log_pi - torch.min(qf1(x, pi), qf2(x, pi))).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward()
                actor_optimizer.step()
                with torch.no_grad():
                    _, log_pi = actor.get_action(x)
                alpha_loss = (-log_alpha.exp() * (log_pi - 1.0)).mean()
                a_optimizer.zero_grad()
                alpha_loss.backward()
                a_optimizer.step()
                alpha = log_alpha.exp().item()
        with torch.no_grad():
            for net, target_net in ((qf1, qf1_target), (qf2, qf2_target)):
                for param, target_param in zip(net.parameters(), target_net.parameters()):
                    target_param.copy_(TAU * param + (1 - TAU) * target_param)
print(f"END qf_loss {qf_loss.item():.6f} alpha {alpha:.6f}")
finish(actor, qf1, qf2, qf1_target, qf2_target, log_alpha, *optimizers, vars(env), vars(rb))
