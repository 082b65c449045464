"""Two small environments in the manner of gym, for the loops of reinforcement learning."""

from __future__ import annotations

import math

import numpy as np


class CartPole:
    """Push a cart left or right to keep its pole up. An episode ends when the pole falls, or after 25 steps."""

    def __init__(self, np_random: np.random.Generator | None = None):
        self.np_random = np_random
        self.state, self.steps = np.zeros(4, np.float32), 0

    def reset(self) -> np.ndarray:
        draw = np.random.uniform if self.np_random is None else self.np_random.uniform
        self.state, self.steps = draw(-0.1, 0.1, 4).astype(np.float32), 0
        return self.state

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """The next observation, the reward, and whether the episode is over."""
        x, v, angle, spin = (float(value) for value in self.state)
        force = 10.0 if action else -10.0
        push = (force + 0.05 * spin * spin * math.sin(angle)) / 1.1
        bend = (9.8 * math.sin(angle) - math.cos(angle) * push) / (0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / 1.1))
        drive = push - 0.05 * bend * math.cos(angle) / 1.1
        self.state = np.array([x + 0.04 * v, v + 0.04 * drive, angle + 0.04 * spin, spin + 0.04 * bend], np.float32)
        self.steps += 1
        return self.state, 1.0, abs(float(self.state[2])) > 0.2 or self.steps >= 25


class Pendulum:
    """Swing a pendulum up by a torque between -2 and 2; an episode lasts 20 steps."""

    def __init__(self) -> None:
        self.angle, self.spin, self.steps = 0.0, 0.0, 0

    def reset(self) -> np.ndarray:
        self.angle, self.spin, self.steps = float(np.random.uniform(-np.pi, np.pi)), float(np.random.uniform(-1, 1)), 0
        return self.seen()

    def step(self, torque: float) -> tuple[np.ndarray, float, bool]:
        """The next observation, the reward, and whether the episode is over."""
        upright = (self.angle + np.pi) % (2 * np.pi) - np.pi
        cost = upright**2 + 0.1 * self.spin**2 + 0.001 * torque**2
        self.spin = max(-8.0, min(8.0, self.spin + (15 * math.sin(self.angle) + 3 * torque) * 0.05))
        self.angle += self.spin * 0.05
        self.steps += 1
        return self.seen(), -cost, self.steps >= 20

    def seen(self) -> np.ndarray:
        """The observation of the state as it is."""
        return np.array([math.cos(self.angle), math.sin(self.angle), self.spin], np.float32)
