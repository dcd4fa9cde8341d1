"""Writes the dataset of the LeRobot workload with LeRobot's own writer: 50 episodes of 500 frames at 50 fps,
state [14], action [14] and a tactile vector [256].

    python lerobot_dataset.py OUT        # lerobot 0.4.4
"""

import sys
from pathlib import Path

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

EPISODES, FRAMES, FPS = 50, 500, 50
WIDTHS = {"observation.state": 14, "action": 14, "observation.tactile": 256}


def main(out: Path) -> None:
    features = {key: {"dtype": "float32", "shape": (width,), "names": None} for key, width in WIDTHS.items()}
    dataset = LeRobotDataset.create("bench/lerobot", FPS, features, root=out, use_videos=False)
    for episode in range(EPISODES):
        rng = np.random.default_rng(episode)
        t = np.arange(FRAMES)[:, None] / FPS
        rows = {}
        for key, width in WIDTHS.items():
            phase, hz, size = (
                rng.uniform(0, 6.28, width),
                rng.uniform(0.1, 1, width),
                rng.uniform(0.2, 1.5, width),
            )
            noise = rng.normal(0, 0.01, (FRAMES, width))
            rows[key] = (size * np.sin(6.28 * hz * t + phase) + noise).astype(np.float32)
        for i in range(FRAMES):
            dataset.add_frame(
                {key: values[i] for key, values in rows.items()} | {"task": f"task {episode % 3}"}
            )
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
