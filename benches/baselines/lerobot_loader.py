"""LeRobot's own dataset behind torch's DataLoader, as its training script builds it, on the LeRobot workload.

python lerobot_loader.py DATASET --workers 2        # lerobot 0.4.4
"""

import argparse
import json

import lerobot
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.datasets.sampler import EpisodeAwareSampler
from timing import rates

BATCH, FPS = 64, 50


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5)
    args = parser.parse_args()
    before = [-1 / FPS, 0.0]
    deltas = {
        "action": [k / FPS for k in range(50)],
        "observation.state": before,
        "observation.tactile": before,
    }
    dataset = LeRobotDataset("bench/lerobot", root=args.dataset, delta_timestamps=deltas)
    episodes = dataset.meta.episodes
    sampler = EpisodeAwareSampler(episodes["dataset_from_index"], episodes["dataset_to_index"], shuffle=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=args.workers)

    def endless():
        while True:
            yield from loader

    batches = endless()

    def step():
        return len(next(batches)["index"])

    print(json.dumps({"samples_per_s": rates(step, args.reps, args.seconds), "lerobot": lerobot.__version__}))


if __name__ == "__main__":
    main()
