"""After CleanRL's PPO: a rollout over several environments, then epochs of shuffled minibatches, with an annealed lr."""

from __future__ import annotations

import numpy as np
import torch
from script_prelude import finish
from tiny_gym import CartPole
from torch import nn
from torch.distributions import Categorical

import fxckpt  # fxckpt

ENVS, STEPS, UPDATES, EPOCHS, MINIBATCH, LR = 3, 8, 10, 2, 12, 2.5e-3


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))

    def get_action_and_value(self, x, action=None):
        probs = Categorical(logits=self.actor(x))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.critic(x).flatten()


def rollout(next_obs, next_done):
    for step in range(STEPS):
        obs[step], dones[step] = next_obs, next_done
        with torch.no_grad():
            actions[step], logprobs[step], _, values[step] = agent.get_action_and_value(next_obs)
        found = [env.step(action) for env, action in zip(envs, actions[step].int().tolist())]
        rewards[step] = torch.tensor([reward for _, reward, _ in found])
        next_done = torch.tensor([float(done) for _, _, done in found])
        seen = [env.reset() if done else o for env, (o, _, done) in zip(envs, found)]
        episodes.extend(1 for _, _, done in found if done)
        next_obs = torch.from_numpy(np.stack(seen))
    return next_obs, next_done


def advantages_of(next_obs, next_done):
    with torch.no_grad():
        next_value, last, out = agent.critic(next_obs).flatten(), 0.0, torch.zeros_like(rewards)
    for t in reversed(range(STEPS)):
        alive = 1.0 - (next_done if t == STEPS - 1 else dones[t + 1])
        following = next_value if t == STEPS - 1 else values[t + 1]
        last = rewards[t] + 0.99 * following * alive - values[t] + 0.99 * 0.95 * alive * last
        out[t] = last
    return out


np.random.seed(1)
torch.manual_seed(1)
envs = [CartPole() for _ in range(ENVS)]
agent = Agent()
optimizer = torch.optim.Adam(agent.parameters(), lr=LR, eps=1e-5)
obs = torch.zeros(STEPS, ENVS, 4)
actions, logprobs, rewards, dones, values = (torch.zeros(STEPS, ENVS) for _ in range(5))
episodes: list[int] = []
last = torch.from_numpy(np.stack([env.reset() for env in envs])), torch.zeros(ENVS)
carried = {"next": last}  # fxckpt
extra = {"carried": carried, "episodes": episodes, **{f"env{i}": vars(env) for i, env in enumerate(envs)}}  # fxckpt
fxckpt.compile_step(optimizer, "ckpt", model=agent, every=1, update="native", extra=extra)  # fxckpt
fxckpt.load()  # fxckpt
for update in fxckpt.steps(UPDATES):  # fxckpt, was: for update in range(UPDATES):
    optimizer.param_groups[0]["lr"] = (1.0 - update / UPDATES) * LR
    last = carried["next"] = rollout(*carried["next"])  # fxckpt, was: last = rollout(*last)
    advantages = advantages_of(*last)
    returns = (advantages + values).flatten()
    b_inds = np.arange(STEPS * ENVS)
    for _epoch in range(EPOCHS):
        np.random.shuffle(b_inds)
        for start in range(0, STEPS * ENVS, MINIBATCH):
            mb = b_inds[start : start + MINIBATCH]
            taken = obs.flatten(0, 1)[mb], actions.flatten()[mb]
            _, newlogprob, entropy, newvalue = agent.get_action_and_value(*taken)
            ratio = (newlogprob - logprobs.flatten()[mb]).exp()
            adv = advantages.flatten()[mb]
            adv = (adv - adv.mean()) / (adv.std() + 1e-8)
            pg_loss = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 0.8, 1.2)).mean()
            loss = pg_loss - 0.01 * entropy.mean() + 0.5 * 0.5 * (newvalue - returns[mb]).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
print(f"END loss {loss.item():.6f} episodes {sum(episodes)}")
finish(agent, optimizer, [vars(env) for env in envs], sum(episodes))
