"""The hand-written neighbour of the LeRobot workload: all columns in RAM, one vectorised gather a batch, one
process, with LeRobot's clamping and masks. Nothing is read while it is timed.

    python numpy_gather.py DATASET [--reps 5] [--seconds 2]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from timing import rates

BATCH = 64
DELTAS = {
    "action": np.arange(50),
    "observation.state": np.arange(-1, 1),
    "observation.tactile": np.arange(-1, 1),
}


def table(root, under, columns=None):
    return pa.concat_tables(
        [pq.read_table(f, columns=columns) for f in sorted((root / under).glob("*/*.parquet"))]
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()

    data = table(args.dataset, "data")
    columns = {}
    for key in data.column_names:
        column = data[key].combine_chunks()
        vector = pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type)
        values = (column.flatten() if vector else column).to_numpy(zero_copy_only=False)
        columns[key] = np.ascontiguousarray(values.reshape(len(column), -1) if vector else values)
    ends = table(args.dataset, "meta/episodes", ["dataset_from_index", "dataset_to_index"])
    first, end = ends["dataset_from_index"].to_numpy(), ends["dataset_to_index"].to_numpy()
    episode = columns["episode_index"]

    def batch(rows):
        out = {key: torch.from_numpy(values[rows]) for key, values in columns.items() if key not in DELTAS}
        low, high = first[episode[rows]][:, None], end[episode[rows]][:, None]
        for key, deltas in DELTAS.items():
            wanted = rows[:, None] + deltas
            out[f"{key}_is_pad"] = torch.from_numpy((wanted < low) | (wanted >= high))
            out[key] = torch.from_numpy(columns[key][np.clip(wanted, low, high - 1)])
        return out

    rng = np.random.default_rng(0)

    def epochs():
        while True:
            order = rng.permutation(len(episode))
            for i in range(0, len(order) - BATCH + 1, BATCH):
                yield order[i : i + BATCH]

    rows = epochs()

    def step():
        batch(next(rows))
        return BATCH

    print(json.dumps({"samples_per_s": rates(step, args.reps, args.seconds)}))


if __name__ == "__main__":
    main()
