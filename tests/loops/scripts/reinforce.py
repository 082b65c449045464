"""After the REINFORCE example: an episode an iteration, actions drawn from the policy, a running reward."""

from __future__ import annotations

import numpy as np
import torch
from script_prelude import finish
from tiny_gym import CartPole
from torch import nn
from torch.distributions import Categorical

import fxckpt  # fxckpt


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine1, self.dropout, self.affine2 = nn.Linear(4, 32), nn.Dropout(0.6), nn.Linear(32, 2)
        self.saved_log_probs, self.rewards = [], []

    def forward(self, x):
        return torch.softmax(self.affine2(torch.relu(self.dropout(self.affine1(x)))), dim=1)


def select_action(state: np.ndarray) -> int:
    m = Categorical(policy(torch.from_numpy(state).unsqueeze(0)))
    action = m.sample()
    policy.saved_log_probs.append(m.log_prob(action))
    return action.item()


def finish_episode():
    returns, R = [], 0.0
    for r in reversed(policy.rewards):
        R = r + 0.99 * R
        returns.insert(0, R)
    returns = torch.tensor(returns)
    returns = (returns - returns.mean()) / (returns.std() + np.finfo(np.float32).eps.item())
    loss = torch.cat([-log_prob * R for log_prob, R in zip(policy.saved_log_probs, returns)]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    policy.rewards.clear()
    policy.saved_log_probs.clear()


torch.manual_seed(543)
env = CartPole(np.random.default_rng(543))
policy = Policy()
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
running = {"reward": 10.0}
extra = {"env": env.np_random, "running": running}  # fxckpt
fxckpt.compile_step(optimizer, "ckpt", model=policy, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
for _episode in fxckpt.steps(30):  # fxckpt, was: for _episode in range(30):
    state, ep_reward, done = env.reset(), 0.0, False
    while not done:
        state, reward, done = env.step(select_action(state))
        policy.rewards.append(reward)
        ep_reward += reward
    running["reward"] = 0.05 * ep_reward + 0.95 * running["reward"]
    finish_episode()
print(f"END last reward {ep_reward} running reward {running['reward']:.6f}")
finish(policy, optimizer, running)
