"""The training step that batches are fed to, the original RoboCache's: a transformer encoder of 4 layers,
d_model 256, 8 heads, FFN 1024, over [32, 250, 256], in bfloat16 by autocast; forward, backward, AdamW.

`Step.run(x)` takes a batch where it lies. `Graph.run(x)` replays the same step as a CUDA graph: a graph reads
fixed addresses, so the batch is copied into its input first, which is one copy on the device.
"""

from __future__ import annotations

import torch
from torch import nn

BATCH, STEPS, DIM, OUT = 32, 250, 256, 14


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, 8, 1024, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x))


class Step:
    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = Policy().to(device)
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, capturable=on_gpu)
        self.target = torch.randn(BATCH, STEPS, OUT, device=device)
        self.loss = torch.zeros((), device=device)

    def run(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self._forward_and_backward(x)

    def _forward_and_backward(self, x: torch.Tensor) -> None:
        # The cache of cast weights must not outlive a capture.
        with torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False):
            loss = nn.functional.mse_loss(self.model(x).float(), self.target)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()


class Graph:
    def __init__(self, step: Step) -> None:
        self.input = torch.randn(BATCH, STEPS, DIM, device=step.device, dtype=torch.bfloat16)
        self.step = step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):
                step.run(self.input)
        torch.cuda.current_stream().wait_stream(side)
        step.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step._forward_and_backward(self.input)

    def run(self, x: torch.Tensor | None) -> None:
        """None: on what the input holds, with no copy."""
        if x is not None:
            self.input.copy_(x, non_blocking=True)
        self.graph.replay()
