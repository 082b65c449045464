"""After the DQN tutorial: episodes of several updates each, a replay memory, a target network that follows softly."""

from __future__ import annotations

import math
import random
from collections import deque

import numpy as np
import torch
from script_prelude import finish
from tiny_gym import CartPole
from torch import nn

import fxckpt  # fxckpt

BATCH_SIZE, GAMMA, EPS_START, EPS_END, EPS_DECAY, TAU = 16, 0.99, 0.9, 0.05, 100, 0.05


class ReplayMemory:
    def __init__(self, capacity: int):
        self.memory = deque(maxlen=capacity)

    def push(self, *transition):
        self.memory.append(transition)

    def sample(self, batch_size: int):
        return random.sample(self.memory, batch_size)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 2))


def select_action(state: torch.Tensor) -> torch.Tensor:
    threshold = EPS_END + (EPS_START - EPS_END) * math.exp(-1.0 * counts["steps_done"] / EPS_DECAY)
    counts["steps_done"] += 1
    if random.random() > threshold:
        with torch.no_grad():
            return policy_net(state).argmax(1, keepdim=True)
    return torch.tensor([[random.randrange(2)]])


def optimize_model():
    if len(memory.memory) < BATCH_SIZE:
        return
    states, actions, next_states, rewards = zip(*memory.sample(BATCH_SIZE))
    non_final = torch.tensor([s is not None for s in next_states])
    values = policy_net(torch.cat(states)).gather(1, torch.cat(actions))
    next_values = torch.zeros(BATCH_SIZE)
    with torch.no_grad():
        next_values[non_final] = target_net(torch.cat([s for s in next_states if s is not None])).max(1).values
    loss = nn.functional.smooth_l1_loss(values, (next_values * GAMMA + torch.cat(rewards)).unsqueeze(1))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(policy_net.parameters(), 100)
    optimizer.step()


random.seed(7)
np.random.seed(7)
torch.manual_seed(7)
env, memory = CartPole(), ReplayMemory(120)
policy_net, target_net = network(), network()
target_net.load_state_dict(policy_net.state_dict())
optimizer = torch.optim.AdamW(policy_net.parameters(), lr=1e-3, amsgrad=True)
counts, durations = {"steps_done": 0}, []
nets = {"policy": policy_net, "target": target_net}  # fxckpt
extra = {"memory": vars(memory), "counts": counts, "durations": durations}  # fxckpt
fxckpt.compile_step(optimizer, "ckpt", model=nets, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
for _episode in fxckpt.steps(14):  # fxckpt, was: for _episode in range(14):
    state, done = torch.from_numpy(env.reset()).unsqueeze(0), False
    while not done:
        action = select_action(state)
        observation, reward, done = env.step(action.item())
        next_state = None if done else torch.from_numpy(observation).unsqueeze(0)
        memory.push(state, action, next_state, torch.tensor([reward]))
        state = next_state
        optimize_model()
        target_state, policy_state = target_net.state_dict(), policy_net.state_dict()
        for key in policy_state:
            target_state[key] = policy_state[key] * TAU + target_state[key] * (1 - TAU)
        target_net.load_state_dict(target_state)
    durations.append(env.steps)
print(f"END durations {durations} steps {counts}")
finish(policy_net, target_net, optimizer, list(memory.memory), durations, counts)
