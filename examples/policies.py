"""Two small policies of one form: normalise, 128 hidden units, an action chunk; in torch and in plain numpy.

Both take `x [B, T, ...]`, `y [B, K, ...]` and `is_pad [B, K]`, leave padded steps out of the loss, and never
write to a batch: it lies in memory shared with the daemon. The one in torch lives where the batches are.
"""

import importlib.util

import numpy as np

HIDDEN = 128


def choose(only_numpy):
    """The policy to use and the name of its framework."""
    if not only_numpy and importlib.util.find_spec("torch"):
        return TorchPolicy, "torch"
    return NumpyPolicy, "numpy"


class TorchPolicy:
    """Adam on a two-layer network. The first batch gives the means and spreads to normalise with."""

    def __init__(self, x, y):
        import torch

        torch.set_num_threads(1)  # the daemon and another trainer share this machine
        x, y = x.flatten(1), y.flatten(1)
        self.x_mean, self.x_std = x.mean(0), x.std(0) + 0.1
        self.y_mean, self.y_std = y.mean(0), y.std(0) + 0.1
        layers = torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, y.shape[1])
        self.net = torch.nn.Sequential(*layers).to(x.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)

    def step(self, x, y, is_pad):
        out = self.net((x.flatten(1) - self.x_mean) / self.x_std)
        error = (out - (y.flatten(1) - self.y_mean) / self.y_std).view(*is_pad.shape, -1)
        loss = (error[~is_pad] ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class NumpyPolicy:
    """Gradient descent with momentum on the same network, written out."""

    def __init__(self, x, y, rate=0.05):
        x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
        self.x_mean, self.x_std = x.mean(0), x.std(0) + 0.1
        self.y_mean, self.y_std = y.mean(0), y.std(0) + 0.1
        rng, inputs, outputs = np.random.default_rng(0), x.shape[1], y.shape[1]
        self.w1 = rng.normal(0, inputs**-0.5, (inputs, HIDDEN)).astype(np.float32)
        self.w2 = rng.normal(0, HIDDEN**-0.5, (HIDDEN, outputs)).astype(np.float32)
        self.b1, self.b2, self.rate = np.zeros(HIDDEN, np.float32), np.zeros(outputs, np.float32), rate
        self.momentum = [np.zeros_like(p) for p in (self.w1, self.b1, self.w2, self.b2)]

    def step(self, x, y, is_pad):
        x = (x.reshape(len(x), -1) - self.x_mean) / self.x_std
        hidden = np.tanh(x @ self.w1 + self.b1)
        error = hidden @ self.w2 + self.b2 - (y.reshape(len(y), -1) - self.y_mean) / self.y_std
        error.reshape(*is_pad.shape, -1)[is_pad] = 0
        d_hidden = error @ self.w2.T * (1 - hidden**2)
        gradients = x.T @ d_hidden, d_hidden.sum(0), hidden.T @ error, error.sum(0)
        for parameter, momentum, gradient in zip(
            (self.w1, self.b1, self.w2, self.b2), self.momentum, gradients, strict=True
        ):
            momentum *= 0.9
            momentum += gradient / len(x)
            parameter -= self.rate * momentum
        return (error**2).sum() / max(1, (~is_pad).sum() * error.shape[1] / is_pad.shape[1])
